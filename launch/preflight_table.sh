#!/usr/bin/env bash
# Makes the table of ig_jax/forecast/RESULTS.md again: about an hour on 2 cores, and nothing runs.
#   bash launch/preflight_table.sh [results]      default runs/preflight.jsonl; needs the extra preflight
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=${1:-runs/preflight.jsonl}
mkdir -p "$(dirname "$results")"

forecast() { # targets, further flags
  .venv/bin/python -m ig_jax.preflight --config=configs/$config.py:XL --config.data.batch_size=$batch --sample_batch=0 \
    --results="$results" --target="$1" "${@:2}" || [ $? -eq 4 ]
}
for batch in 256 1024; do
  for config in sit_imagenet256 lightningdit_imagenet256; do
    forecast gpu:h200:1,gpu:h100:8
    forecast tpu:v5e:4x4,tpu:v5e:16x16,tpu:v5p:4x4x4 --quick
  done
done
.venv/bin/python launch/preflight_table.py "$results"
