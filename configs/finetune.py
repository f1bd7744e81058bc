"""Fine-tuning of a checkpoint, trained here or converted, with its network, loss, optimizer and latent statistics.

python -m ig_jax.train --config=configs/finetune.py:runs/sit_xl --workdir=runs/finetuned
argument   the work directory (or one step) of a run or of a converted checkpoint, then after a comma runlocal.
           The weights are its first EMA; the optimizer starts anew. Override any setting
           (--config.data.name=..., --config.loss.accelerate=True, --config.optimizer.learning_rate=1e-5)
           The checkpoint must stay where it is until this run is finished: every launch reads its settings
data       of a converted checkpoint: --config.data.folder=DIR, as in sit_imagenet256.py
hardware   that of training the network
time       not measured
expect     the losses begin where they ended
:PATH,runlocal  200 steps of the same: train configs/digits.py:runlocal first
"""

import ml_collections

from ig_jax.config import files as config_files


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """`arg`: the checkpoint's path, then runlocal, as above."""
    config, _ = config_files.from_checkpoint(arg)
    config.name = f"{config.name}_finetune"
    return config
