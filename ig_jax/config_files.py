"""What the files in configs/ share: their flag, their argument, and the small form on the built-in digits."""

import ml_collections
from absl import flags
from ml_collections import config_flags


def define_flag(doc: str, values: flags.FlagValues) -> flags.FlagHolder:
    """--config=FILE[:ARGUMENT], with --config.KEY=VALUE for every setting of an experiment.

    Settings that the file leaves out are taken too, and unknown ones: `config.bind` names those.
    """
    return config_flags.DEFINE_config_file(
        "config", None, doc, flag_values=values, lock_config=False, accept_new_attributes=True)


def choices(argument: str, *groups: tuple[str, ...]) -> tuple[str, ...]:
    """One word of each group from an argument such as "XL,release"; the first of a group where none is given.

    Raises: ValueError for a word of no group, or two of one.
    """
    words = [word for word in argument.split(",") if word]
    chosen = tuple(next((word for word in words if word in group), group[0]) for group in groups)
    for word in words:
        if words.count(word) > 1 or word not in chosen:
            raise ValueError(f"config argument {argument!r} must have at most one word of each: "
                             + "; ".join(" or ".join(group) for group in groups))
    return chosen


def from_checkpoint(
    argument: str, *groups: tuple[str, ...]
) -> tuple[ml_collections.ConfigDict, tuple[str, ...]]:
    """(all settings of a checkpoint, started from its weights; the words) of an argument "runs/plain,words".

    Raises: ValueError for an argument without a checkpoint or with other words, UserError for a bad checkpoint.
    """
    from ig_jax import pretrained  # late: brings JAX and Orbax, which other configs do without

    checkpoint, _, words = argument.partition(",")
    if not checkpoint:
        raise ValueError("config argument must begin with a checkpoint, such as runs/plain")
    chosen = choices(words, *groups, ("full", "runlocal"))
    config = ml_collections.ConfigDict(pretrained.stored_experiment(checkpoint).as_dict())
    config.init = dict(checkpoint=checkpoint, ema="")
    runlocal = chosen[-1] == "runlocal"
    config.run = dict(
        steps=200 if runlocal else 50_000, log_every=50, checkpoint_every=100 if runlocal else 2_000,
        keep_checkpoints=2, preview_every=0, preview_images=0,
    )
    return config, chosen


def on_digits(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The same family, loss, optimizer and solver, a small network and the built-in digits."""
    config.name = f"{config.name}_runlocal"
    config.model.update(
        input_size=8, channels=1, patch_size=2, depth=6, width=64, num_heads=2, num_classes=10,
        inter_depth=(2,), dtype="float32",
    )
    config.latents = dict(name="pixels", shift=(0.0,), scale=(1.0,), uint8_rule="half")
    config.loss.update(direction_weight=0.0)  # one channel has no direction
    config.optimizer.update(learning_rate=2e-3, warmup_steps=100, accumulate=1)
    config.ema.update(decays=(0.999,), warmup=True)
    config.data = dict(
        source="tfds", name="ig_digits", folder="", split="train", test_split="test", batch_size=128, pad=0,
        in_memory=True,
    )
    config.mesh.update(data=-1, fsdp=1, tensor=1, fsdp_up_to=1)
    config.run.update(steps=200, log_every=50, checkpoint_every=100, keep_checkpoints=2, preview_every=100,
                      preview_images=40)
    config.sample.update(steps=25)
    return config
