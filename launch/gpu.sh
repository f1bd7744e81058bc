#!/usr/bin/env bash
# All benchmarks on a CUDA GPU, the most important first. They need no more than JAX, Flax, Optax, einops and absl; the
# last two parts also need torch and diffusers.
#   bash launch/gpu.sh [part ...]      kernels attention scan sample buffers train peer_train peer_sample; default all
#   RESULTS=runs/gpu.jsonl  file to which every case is added              LIMIT=600  seconds that one command may take
#   TINY=1                  narrow networks of two blocks, to check every command on any machine
# shellcheck disable=SC2086  # several flags stand in one variable
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
results=${RESULTS:-runs/gpu.jsonl}
failed=()

measure() { # name, flags of the benchmark
  local name=$1
  shift
  [ -z "${TINY:-}" ] || set -- "$@" --batch=2 --depth=2 --width=576 --latent=8 --repeats=2 --warmup=1
  echo; echo "== $name: $*"
  timeout -k 20 "${LIMIT:-600}" "$python" -m ig_jax.benchmark "$@" --dtype=bfloat16 --results="$results" ||
    failed+=("$name")
}
steps=${TINY:+4}
few="--warmup=1 --repeats=2"
peers=("--peer=$python launch/peer_diffusers.py" "--peer=$python launch/peer_diffusers.py --compile")

# cuDNN's attention against XLA's with heads of 64 and 72, parity and time; the four matrix products of a block.
kernels() { measure kernels kernels --model=SiT-B/2,SiT-XL/2 --batch=256; }
attention() { measure attention train --model=SiT-XL/2,SiT-B/2 --batch=64 --attention=cudnn,xla; }
scan() { measure scan train --model=SiT-XL/2 --batch=64 --scan=False,True; }
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
train() {
  measure train train --model=SiT-XL/2 --batch=128,256 --remat=none,dots
  measure train train --model=SiT-B/2 --batch=256,512
}
peer_train() {
  measure peer_train train --model=SiT-B/2 --batch=256 "${peers[@]}"
  measure peer_train train --model=SiT-XL/2 --batch=64 "${peers[@]}"
}
peer_sample() {
  measure peer_sample sample --model=SiT-XL/2 --batch=64 --steps="${steps:-25}" "${peers[@]}" $few
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
echo; echo "lines in $results: $(wc -l < "$results"); failed: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]
