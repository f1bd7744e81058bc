"""An intermediate head added to a trained network that has none, for sampling with internal guidance.

python -m ig_jax.train --config=configs/retrofit.py:runs/plain --workdir=runs/retrofit
argument   the work directory (or one step) of a run without a head, or of a converted checkpoint; then,
           after commas, "everything" to train the whole network with both losses instead of the head
           alone, and runlocal. All other settings come from the checkpoint; override any of them
           (--config.data.folder=..., --config.model.inter_depth="(4,)")
           The checkpoint must stay where it is until this run is finished: every launch reads its settings
head alone the network and its final output stay bitwise identical, and so do samples at w = 1. The
           backward pass ends at the head: a step costs little more than a forward pass
hardware   that of sampling the network for the head alone, of training it for everything
time       not measured at full size
expect     the head's loss (loss/intermediate) falls to near that of a head trained from the start
:PATH,runlocal  200 steps of the same: train configs/digits.py:plain,runlocal first
"""

import ml_collections

from ig_jax.config import files as config_files


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """`arg`: the checkpoint's path, then options, as above."""
    config, (part, _) = config_files.from_checkpoint(arg, ("head", "everything"))
    if config.model.inter_depth:
        raise ValueError(
            f"checkpoint={config.init.checkpoint!r} must be of a network without an intermediate head; it "
            f"has one after block {config.model.inter_depth[0]}, sample it as it is"
        )
    config.name = f"{config.name}_retrofit"
    # A third of the way, at most 8: block 4 of B and 8 of L and XL, where the paper puts them.
    config.model.inter_depth = (min(8, max(1, config.model.depth // 3)),)
    config.loss.update(inter_weight=(0.5,), accelerate=False)
    config.optimizer = dict(
        name="adamw",
        learning_rate=config.optimizer.learning_rate,
        schedule="constant",
        warmup_steps=100,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        clip_norm=1.0,
        accumulate=config.optimizer.accumulate,
        train_only=("inter_heads",) if part == "head" else (),
    )
    return config
