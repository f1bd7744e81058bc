#!/usr/bin/env bash
# What a CUDA GPU should say of this project, in the order in which the answers matter; needs JAX alone, and torch
# and diffusers for the last two parts.
#   bash launch/gpu.sh [part ...]      all parts where none is named: kernels attention scan sample buffers train
#                                      peer_train peer_sample
#   RESULTS=runs/gpu.jsonl  the file that every case is added to       LIMIT=600  seconds that one command may take
#   TINY=1                  one narrow block, to see that every command runs, on any machine
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
results=${RESULTS:-runs/gpu.jsonl}
failed=()

measure() { # name, flags of the benchmark
  local name=$1
  shift
  [ -z "${TINY:-}" ] || set -- "$@" --batch=2 --depth=2 --width=576 --latent=8 --repeats=2 --warmup=1 --wait=0
  echo; echo "== $name: $*"
  timeout -k 20 "${LIMIT:-600}" "$python" -m ig_jax.benchmark "$@" --dtype=bfloat16 --results="$results" ||
    failed+=("$name")
}
steps=${TINY:+4}
few="--warmup=1 --repeats=2"

# cuDNN's attention against XLA's with heads of 64 and 72, parity and time; the four matrix products of a block.
kernels() { measure kernels kernels --model=SiT-B/2,SiT-XL/2 --batch=256; }
attention() { measure attention train --model=SiT-XL/2,SiT-B/2 --batch=64 --attention=cudnn,xla; }
scan() { measure scan train --model=SiT-XL/2 --batch=64 --scan=off,on; }
sample() {
  measure sample sample --model=SiT-XL/2 --batch=64,128,256 --steps="${steps:-50}" $few
  measure "sample, IG alone" sample --model=SiT-XL/2 --batch=128 --steps="${steps:-50}" --cfg_scale=1 $few
}
# Command buffers (CUDA graphs) are on by default; the same two without them.
buffers() {
  local flag=--xla_gpu_enable_command_buffer=
  for XLA_FLAGS in "" "$([ -n "${TINY:-}" ] || echo $flag)"; do
    export XLA_FLAGS
    measure "buffers with XLA_FLAGS=$XLA_FLAGS" sample --model=SiT-XL/2 --batch=64 --steps="${steps:-25}" $few
    measure "buffers with XLA_FLAGS=$XLA_FLAGS" train --model=SiT-B/2 --batch=256
  done
  unset XLA_FLAGS
}
# The optimizer's pass against its floor stands in the table of every train command.
train() {
  measure train train --model=SiT-XL/2 --batch=128,256 --remat=none,dots
  measure train train --model=SiT-B/2 --batch=256,512
}
peer_train() {
  measure peer_train train --model=SiT-B/2 --batch=256 --peer=diffusers --peer_compile
  measure peer_train train --model=SiT-XL/2 --batch=64 --peer=diffusers --peer_compile
}
peer_sample() {
  measure peer_sample sample --model=SiT-XL/2 --batch=64 --steps="${steps:-25}" --peer=diffusers --peer_compile $few
  measure "whole sampler" sample --model=SiT-XL/2 --batch=128 --steps="${steps:-250}" --cfg_scale=1.35,1 \
    --warmup=1 --repeats=1
}

parts=(kernels attention scan sample buffers train peer_train peer_sample)
for part in "${@:-${parts[@]}}"; do
  case " ${parts[*]} " in
    *" $part "*) $part ;;
    *) echo "usage: launch/gpu.sh [part ...], of ${parts[*]}" >&2; exit 2 ;;
  esac
done
echo; echo "$(wc -l < "$results") records in $results; failed: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]
