#!/usr/bin/env bash
# From a bare machine to guided samples of real images: install, train, compare, measure. Run it again to resume.
#   bash launch/demo.sh [workdir]         default runs/digits; 3 to 4 minutes on 2 CPU cores, without the download
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
python=.venv/bin/python
work=${1:-runs/digits}

echo; echo "== 1/3 train: SiT with an intermediate head on 1,437 handwritten digits"
$python -m ig_jax.train --config=configs/digits.py --workdir="$work"

echo; echo "== 2/3 sample: the same noise without guidance, with CFG, with IG, with both"
$python -m ig_jax.sample --checkpoint="$work" --out="$work/compare" --compare --num=80 --ig_scale=2 --cfg_scale=1.25

echo; echo "== 3/3 evaluate: Frechet distance on the features of a small CNN, over a sweep of scales"
$python -m ig_jax.evaluate --checkpoint="$work" --out="$work/evaluation" --num=1000

cat <<END

Done. Look at
  $work/compare/compare.png     the same noise under none / CFG / IG / IG + CFG
  $work/previews/               samples as training went on
  $work/evaluation/table.txt    the table above; table.json has every number with its recipe
  $work/checkpoints/            Orbax checkpoints: this directory is all that sampling needs
  $work/tensorboard/            $python -m tensorboard.main --logdir $work/tensorboard
Try next
  $python -m ig_jax.sample --checkpoint=$work --out=$work/sevens --labels=7 --ig_scale=2
  $python -m ig_jax.train --config=configs/digits.py --workdir=runs/accelerated --config.loss.accelerate=True
  edit batch_loss in ig_jax/training/step.py, and train into a new workdir
END
