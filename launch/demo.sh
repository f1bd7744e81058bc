#!/usr/bin/env bash
# From a bare machine to guided samples of real images: install, train, compare, measure. Run it again to resume.
#   bash launch/demo.sh [workdir]         default runs/digits; about 5 minutes on 2 CPU cores, without the download
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
python=.venv/bin/python
work=${1:-runs/digits}
accelerated=${work}_accelerated

echo; echo "== 1/4 train: SiT with an intermediate head on 1,437 handwritten digits"
$python -m ig_jax.train --config=configs/digits.py --workdir="$work"

echo; echo "== 2/4 compare: the same noise with no guidance, with CFG, with IG, with both"
$python -m ig_jax.visualize compare --checkpoint="$work" --out="$work/compare" --num=80 --ig_scale=2 --cfg_scale=1.25

echo; echo "== 3/4 evaluate: Frechet distance on the features of a small CNN, over a sweep of scales"
$python -m ig_jax.evaluate --checkpoint="$work" --out="$work/evaluation" --num=1000 --cfg_scales=1.1,1.25

echo; echo "== 4/4 accelerate: the same training with the accelerated target, evaluated without guidance"
$python -m ig_jax.train --config=configs/digits.py --workdir="$accelerated" --config.run.preview_every=0 \
  --config.loss.accelerate=True --config.loss.gap_source=online
$python -m ig_jax.evaluate --checkpoint="$accelerated" --out="$accelerated/evaluation" --classifier="$work/evaluation" \
  --num=1000 --ig_scales= --cfg_scales=

echo; echo "== the best scales of each kind, and the accelerated target"
$python - "$work/evaluation" "$accelerated/evaluation" <<'END' | tee "$work/evaluation/demo.txt"
import json
import sys
from pathlib import Path

from ig_jax.evaluation import report, sweep

plain, accelerated = (json.loads((Path(folder) / "table.json").read_text()) for folder in sys.argv[1:])
rows = [plain["real"], *(sweep.best(plain["rows"], kind) for kind in ("none", "CFG", "IG", "IG+CFG"))]
print(report.table([*rows, {**accelerated["rows"][0], "setting": "accelerated target, no guidance"}]))
END

cat <<END

Done. Look at
  $work/compare/compare.png     the same noise with no guidance / CFG / IG / IG + CFG
  $work/previews/               samples as training went on
  $work/evaluation/demo.txt     the table above; table.json has every number with its recipe
  $work/checkpoints/            Orbax checkpoints: this directory is all that sampling needs
  losses and previews           $python -m tensorboard.main --logdir $work
Try next
  $python -m ig_jax.sample --checkpoint=$work --out=$work/sevens --labels=7 --ig_scale=2
  $python -m ig_jax.visualize gap --checkpoint=$work --out=$work/gap
  edit ig_jax/diffusion/loss.py, and train into a new workdir (CONTRIBUTING.md)
END
