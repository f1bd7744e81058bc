#!/usr/bin/env bash
# Internal guidance on Fashion-MNIST at 16x16: all numbers and pictures of configs/RESULTS.md. Run it again to resume.
#   bash launch/fashion.sh [DIR [FOLDER]]     runs/fashion, and the folder with the four IDX files of Fashion-MNIST
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-runs/fashion}
images=${2:-/usr/share/datasets/fashion-mnist} # where Debian's package dataset-fashion-mnist puts them
bash launch/setup.sh
python=.venv/bin/python
$python launch/fashion.py shrink "$images" "$out/data"
train() { # NAME [overrides of settings]
  $python -m ig_jax.train --config=configs/fashion_mnist.py:small --config.data.folder="$out/data" \
    --config.seed=$seed --workdir="$out/$seed/$1" "${@:2}"
}
for seed in 0 1 2; do
  train plain --config.model.inter_depth= --config.loss.inter_weight= --config.sample.ig_scale=1
  for depth in 1 2 4; do train head$depth --config.model.inter_depth=$depth; done
  train accelerated --config.loss.accelerate=True --config.loss.gap_source=online
  $python launch/fashion.py measure "$out" $seed
done
$python launch/fashion.py report "$out"
