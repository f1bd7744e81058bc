#!/usr/bin/env bash
# Run a command in several processes on this machine.
#   launch/local.sh 2 python -m ig_jax.sample --checkpoint=runs/digits --out=runs/digits/samples
# All end when one fails. The exit code is that of the first to fail, of those that end with 70 if there is no other.
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
# Processes of ig_jax end together by themselves, with 70 where another one is the cause; what is left is stopped.
stop_late() {
  (sleep 10; kill -TERM "${pids[@]}"; sleep 10; kill -KILL "${pids[@]}") >/dev/null 2>&1 &
  disown
}
for signal in INT TERM USR1 HUP; do
  trap 'kill -'$signal' "${pids[@]}" 2>/dev/null' $signal
done
code=0
running=$count
while [ "$running" -gt 0 ]; do
  ended=
  wait -n -p ended
  result=$?
  [ -n "$ended" ] || continue # a signal, passed on above
  running=$((running - 1))
  if [ $result -ne 0 ]; then
    [ $code -ne 0 ] || stop_late
    [ $code -ne 0 ] && [ $code -ne 70 ] || code=$result
  fi
done
exit $code
