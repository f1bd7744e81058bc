#!/usr/bin/env bash
# Several processes on this machine as one run.
#   launch/local.sh 2 python -m ig_jax.sample --checkpoint=runs/digits --out=runs/digits/samples
# The first to fail ends the others, and its exit code is the exit code of all.
set -u
if [ $# -lt 2 ] || ! [ "$1" -gt 0 ] 2>/dev/null; then
  echo "usage: launch/local.sh PROCESSES COMMAND..." >&2
  exit 2
fi
count=$1
shift
port=${IG_JAX_PORT:-$((20000 + RANDOM % 20000))}
pids=()
for ((i = 0; i < count; i++)); do
  IG_JAX_PROCESSES=$count IG_JAX_PROCESS=$i IG_JAX_COORDINATOR=127.0.0.1:$port "$@" &
  pids+=($!)
done
# JAX's runtime takes SIGTERM for a notice of preemption, so whoever is still there 10 s later is ended.
stop() {
  kill -TERM "${pids[@]}" 2>/dev/null
  (sleep 10; kill -KILL "${pids[@]}") >/dev/null 2>&1 &
}
trap stop INT TERM
code=0
for ((i = 0; i < count; i++)); do
  wait -n
  ended=$?
  if [ $ended -ne 0 ] && [ $code -eq 0 ]; then
    code=$ended
    stop
  fi
done
exit $code
