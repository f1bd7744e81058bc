#!/usr/bin/env bash
# The first picture of the README: internal guidance on points of the plane, from training to fractal.png.
#   bash launch/fractal.sh [DIR]      runs/fractal by default
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-runs/fractal}
bash launch/setup.sh
python=.venv/bin/python
$python -m ig_jax.train --config=configs/fractal.py --workdir="$out/plain"
$python -m ig_jax.train --config=configs/fractal.py --workdir="$out/accelerated" --config.loss.accelerate=True
$python launch/fractal.py "$out/plain" "$out/accelerated" "$out"
