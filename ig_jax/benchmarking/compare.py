"""Variants in turns A B A B: all at once where they share a host, one after the other where one device is shared."""

import dataclasses
import math
from collections.abc import Callable

from ig_jax.benchmarking.cases import Case
from ig_jax.benchmarking.timing import Spread, Turn
from ig_jax.benchmarking.worker import Failed, Worker
from ig_jax.errors import UserError

TURN_SECONDS = 0.2  # a turn lasts at least so long, in whole calls
MOST_CALLS = 200


@dataclasses.dataclass
class Variant:
    """One way to do the work of a group, and what was measured of it."""

    label: str
    case: Case
    start: Callable[[], Worker]
    framework: str = "ig_jax"
    worker: Worker | None = None
    report: dict = dataclasses.field(default_factory=dict)
    turns: list[Turn] = dataclasses.field(default_factory=list)
    extras: dict = dataclasses.field(default_factory=dict)
    failure: Failed | UserError | None = None

    @property
    def wall(self) -> list[float]:
        """Seconds a call by the wall, one for each turn."""
        return [turn.wall for turn in self.turns]

    @property
    def cpu(self) -> list[float]:
        """CPU seconds a call, one for each turn."""
        return [turn.cpu for turn in self.turns]

    def spread(self, clock: str) -> Spread:
        """Of "wall" or "cpu", seconds."""
        return Spread.of(getattr(self, clock))


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is measured."""

    repeats: int
    warmup: int
    wait: float  # seconds to wait for an idle machine before a turn
    profile: str  # a directory for traces, "" for none


def compare(variants: list[Variant], plan: Plan, said: Callable[[Variant, str], None]) -> None:
    """Fill in the turns of every variant; `said` hears of each thing done.

    A variant that fails, for lack of memory or otherwise, keeps its failure; the others go on.
    """
    try:
        _open(variants[0], plan, said)
        # An accelerator's memory holds one of them. On the host all stay, and the turns are single.
        alone = len(variants) > 1 and variants[0].report.get("hardware", {}).get("platform") != "cpu"
        rounds = [math.ceil(plan.repeats / 2), plan.repeats // 2] if alone else [1] * plan.repeats
        if not alone:
            for variant in variants[1:]:
                _open(variant, plan, said)
        for number, count in enumerate(rounds):
            for variant in variants:
                _open(variant, plan, said)
                _take(variant, count, plan, said)
                if alone or number == len(rounds) - 1:
                    _close(variant, plan, said)
    finally:
        for variant in variants:
            if variant.worker is not None:
                variant.worker.close()
                variant.worker = None


def _guarded(action):
    """A variant that has failed is left alone, and a failure is kept instead of raised."""

    def guarded(variant: Variant, *arguments) -> None:
        if variant.failure is not None:
            return
        try:
            action(variant, *arguments)
        except (Failed, UserError) as error:
            variant.failure = error
            if variant.worker is not None:
                variant.worker.close()
                variant.worker = None

    return guarded


@_guarded
def _open(variant: Variant, plan: Plan, said) -> None:
    if variant.worker is not None:
        return
    variant.worker = variant.start()
    first = not variant.report
    variant.report = variant.report or variant.worker.report
    seconds = 0.0
    for number in range(plan.warmup):
        turn = variant.worker.turn(1)
        if first and number == 0:
            variant.report["first_call"] = turn.wall
        seconds = turn.wall
    variant.report["calls"] = max(1, min(MOST_CALLS, math.ceil(TURN_SECONDS / max(seconds, 1e-6))))
    if first:
        said(variant, "ready")


@_guarded
def _take(variant: Variant, count: int, plan: Plan, said) -> None:
    for _ in range(count):
        variant.turns.append(variant.worker.turn(variant.report["calls"], plan.wait))
        said(variant, f"{1e3 * variant.turns[-1].wall:,.1f} ms")


@_guarded
def _close(variant: Variant, plan: Plan, said) -> None:
    if not variant.extras:
        if plan.profile and variant.framework == "ig_jax":
            variant.worker.profile(f"{plan.profile}/{variant.label.replace(' ', '_').replace('/', '-')}", 3)
        variant.extras = variant.worker.finish()
        said(variant, "measured")
    variant.worker.close()
    variant.worker = None
