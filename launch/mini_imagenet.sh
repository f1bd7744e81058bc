#!/usr/bin/env bash
# ImageNet in small, end to end: photographs -> latents -> training -> pictures, from every form of the images.
#   bash launch/mini_imagenet.sh [workdir]    default runs/mini_imagenet; 4 minutes of CPU time, about 3 on 2 cores
# shellcheck disable=SC2086  # several flags stand in one variable
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/python ] || bash launch/setup.sh
python=.venv/bin/python
work=${1:-runs/mini_imagenet}
steps=${STEPS:-400}
$python -c "import skimage, sklearn, pyarrow" 2>/dev/null || $python -m pip install -q scikit-image scikit-learn pyarrow

echo "== 1/5 photographs in the forms of ImageNet, and an autoencoder in the form of its release"
if [ ! -d "$work/autoencoder" ]; then
  rm -rf "$work"
  $python launch/mini_imagenet.py make "$work"
  $python -m ig_jax.convert --checkpoint="$work/autoencoder_by_hand" --to="$work/published/autoencoder.safetensors"
  $python -m ig_jax.convert --from="$work/published/autoencoder.safetensors" --out="$work/autoencoder"
fi

echo; echo "== 2/5 encode the class folders, the raw tars and the parquet files"
for form in images tars parquet; do
  $python -m ig_jax.encode --images="$work/$form" --autoencoder="$work/autoencoder" --out="$work/latents/$form" \
    --size=64 --dtype=float32 --flip=none --shard_size=64
done
$python launch/mini_imagenet.py repa "$work/latents/images" "$work/repa"

echo; echo "== 3/5 ten steps of training on each, and on the same latents in REPA's form"
small="--config=configs/sit_imagenet256.py:B --config.model.input_size=16 --config.model.depth=4 --config.model.width=96
  --config.model.num_heads=4 --config.model.num_classes=8 --config.model.inter_depth=2, --config.model.dtype=float32
  --config.data.batch_size=32 --config.run.preview_every=0 --config.optimizer.learning_rate=0.001 --config.ema.decays=0.99,"
for form in images tars parquet; do
  $python -m ig_jax.train $small --workdir="$work/train/$form" --config.data.folder="$work/latents/$form" --config.run.steps=10 --config.run.log_every=1
done
$python -m ig_jax.train $small --workdir="$work/train/repa" --config.data.folder="$work/repa" --config.data.source=repa --config.run.steps=10 --config.run.log_every=1
$python launch/mini_imagenet.py compare "$work" images tars parquet repa

echo; echo "== 4/5 latents of both mirrors in bfloat16, and $steps steps of training"
$python -m ig_jax.encode --images="$work/images" --autoencoder="$work/autoencoder" --out="$work/latents/both" --size=64
$python -m ig_jax.train $small --workdir="$work/train/both" --config.data.folder="$work/latents/both" --config.run.steps="$steps"

echo; echo "== 5/5 pictures"
$python -m ig_jax.sample --checkpoint="$work/train/both" --autoencoder="$work/autoencoder" --out="$work/samples" --num=32 --steps=50
echo "Done. Look at $work/latents/both/check.png and $work/samples_grid.png"
