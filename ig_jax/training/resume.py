"""What may differ between a run and the checkpoint that it goes on from: one table.

Data are compared by their fingerprint (data/pipeline.py) besides, and arrays by name, shape and dtype.
"""

import jax.numpy as jnp

from ig_jax.base.errors import check
from ig_jax.config.experiment import Experiment
from ig_jax.optim.optimizer import learning_rate
from ig_jax.training.initialise import ARITHMETIC

SAME = "set it back, or start in an empty workdir"  # another value would give the weights another meaning
PRINTED = "printed"  # changes what is learnt from here on
FREE = "free"  # changes nothing that is learnt

# The longest name that fits decides. Any other word than these three is what to do instead of a change.
_AFRESH = "it needs other moments: start in an empty workdir with --config.init.checkpoint of this one"
TABLE = {
    "": SAME,
    **dict.fromkeys(("name", "init", "data", "mesh", "run", "sample", "optimizer.accumulate"), FREE),
    **dict.fromkeys(("process", "loss", "optimizer", "ema", *(f"model.{n}" for n in ARITHMETIC)), PRINTED),
    **dict.fromkeys(("process.kind", "process.prediction"), SAME),
    **{f"optimizer.{name}": _AFRESH for name in ("name", "muon_routing", "train_only")},
}
_RATE = ("optimizer.learning_rate", "optimizer.schedule", "optimizer.warmup_steps", "run.steps")


def differences(old: Experiment, new: Experiment) -> dict[str, tuple]:
    """(value before, value now) of each setting that differs, by dotted name; None for one that is not there."""
    before, after = flat(old.as_dict()), flat(new.as_dict())
    pairs = {name: (before.get(name), after.get(name)) for name in before | after}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def changes(old: Experiment, new: Experiment, step: int) -> list[str]:
    """A line for each setting that changes what is learnt from `step` on.

    Raises: UserError naming the first setting that must be the same, or whose change is refused.
    """
    lines, differ = [], differences(old, new)
    for name, (stored, wanted) in differ.items():
        verdict = TABLE[max((known for known in TABLE if _below(name, known)), key=len)]
        allowed = verdict in (PRINTED, FREE)
        check(allowed, f"config.{name}", wanted, f"{stored!r}, as in the checkpoint of this run", verdict)
        if verdict == PRINTED and name not in _RATE:
            lines.append(f"{name} {stored} -> {wanted}")
    rates = [float(learning_rate(e.optimizer, e.run.steps)(jnp.int32(step))) for e in (old, new)]
    lasting = ("run.steps",) if "cosine" not in (old.optimizer.schedule, new.optimizer.schedule) else ()
    if any(name in differ for name in _RATE if name not in lasting):
        lines.append(f"{_schedule(old, new)}: learning rate {rates[0]:.1e} -> {rates[1]:.1e}")
    return lines


def _schedule(old: Experiment, new: Experiment) -> str:
    """ "cosine over 20 -> 40 steps", with the name of the old schedule where it was another."""
    kinds = dict.fromkeys(e.optimizer.schedule for e in (old, new))
    steps = dict.fromkeys(str(e.run.steps) for e in (old, new))
    return f"{' -> '.join(kinds)} over {' -> '.join(steps)} steps"


def flat(tree: dict, prefix: str = "") -> dict:
    """Settings by dotted name."""
    found: dict = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _below(name: str, known: str) -> bool:
    return not known or f"{name}.".startswith(f"{known}.")
