"""Reproduction cards: a published result, the commands that would make it here, and the judgement of a number."""

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

from ig_jax.base.errors import check
from ig_jax.config import published
from ig_jax.models import cost
from ig_jax.models.dit import DiTConfig

# Preflight's roofline (launch/README.md): SiT-XL/2, 400,000 steps with batch 256 on 8 H100. Others by their FLOPs.
XL_HOURS = 69.0
XL_STEPS = 400_000
TOLERANCE = 0.03  # of the target: two samplings of one network differ by 1 %, two trainings by 2 to 3 %
ROUGH = 0.1  # of targets that are read off a figure
PAPER = "arXiv 2512.24176"


@dataclasses.dataclass(frozen=True)
class Card:
    """A row of the paper: FID of 50,000 samples on ImageNet 256x256, and what else it reports."""

    system: str
    model: str  # as config/published.py names it
    steps: int  # of training, batch 256
    sampling: tuple[str, ...]  # flags of sample and evaluate
    fid: float
    others: Mapping[str, float] = dataclasses.field(default_factory=dict)  # by the keys of metrics.json, for the table
    training: tuple[str, ...] = ()  # overrides of the config
    tolerance: float = TOLERANCE
    labels: str = "random"

    @property
    def config(self) -> str:
        """The config file with its argument."""
        family, size = self.model.split("-")
        return f"configs/{family.lower()}_imagenet256.py:{size.split('/')[0]}"

    @property
    def hours(self) -> float:
        """H100 hours of the training, by preflight's estimate for SiT-XL/2."""
        flops = [cost.forward_macs(DiTConfig(**published.settings(name)["model"])) for name in (self.model, "SiT-XL/2")]
        return XL_HOURS * self.steps / XL_STEPS * flops[0] / flops[1]

    def commands(self) -> list[str]:
        """Training and evaluation."""
        train = f"python -m ig_jax.train --config={self.config} --config.data.folder=latents --workdir=runs/card"
        more = [f"--config.run.steps={self.steps}", *self.training]
        given = "--checkpoint=runs/card --autoencoder=AE --reference=REF --inception=IN --out=runs/card/fid"
        return [f"{train} {shlex.join(more)}", f"python -m ig_jax.evaluate {given} {shlex.join(self.flags)}"]

    @property
    def flags(self) -> list[str]:
        """The flags of its samples."""
        return [*self.sampling, f"--labels={self.labels}", "--num=50000"]

    def page(self) -> str:
        """The card as text."""
        others = ", ".join(f"{key} {value:g}" for key, value in self.others.items())
        return "\n".join(
            [
                f"system      {self.system}",
                f"data        latents of ImageNet 256x256; batch 256, {self.steps:,} steps; {self.labels} labels",
                f"target      FID {self.fid:g} within {self.tolerance:.0%}{f' ({others})' if others else ''}, {PAPER}",
                f"hardware    about {self.hours:,.0f} H100 hours (preflight's estimate, not measured)",
                *(f"command     {command}" for command in self.commands()),
            ]
        )

    def judge(self, found: Mapping[str, Any]) -> str:
        """What metrics.json says of the card."""
        fid, count = found["fid"], found["count"]
        if fid is None:
            return "not judged: the reference has no statistics"
        distance = (fid - self.fid) / self.fid
        words = f"FID {fid:.2f} here, {self.fid:g} in the paper ({distance:+.1%}, {self.tolerance:.0%} allowed)"
        if count != 50_000:
            return f"not judged: {count:,} samples, not 50,000; {words}"
        return f"{'reproduced' if abs(distance) <= self.tolerance else 'not reproduced'}: {words}"


def _paper(fid: float, sfid: float, score: float, precision: float, recall: float) -> dict[str, Any]:
    return {"fid": fid, "others": dict(sfid=sfid, inception_score=score, precision=precision, recall=recall)}


_NO_HEAD = ("--config.model.inter_depth=()", "--config.loss.inter_weight=()", "--config.sample.ig_scale=1.0")
_SDE = ("--solver=sde", "--steps=250")
_PLAIN = (*_SDE, "--ig_scale=1", "--cfg_scale=1")
_B: dict[str, Any] = dict(model="SiT-B/2", steps=400_000)
_XL: dict[str, Any] = dict(model="SiT-XL/2", steps=4_000_000)
_LDIT: dict[str, Any] = dict(model="LightningDiT-XL/1", steps=3_400_000)
_IG, _BOTH = ("--preset=lightningdit-ig",), ("--preset=lightningdit-ig-cfg",)


def _head(block: int) -> tuple[str, ...]:
    return (f"--config.model.inter_depth=({block},)",)


def _accelerated(steps: int, fid: float) -> Card:
    system = f"SiT-B/2, accelerated target, {steps // 1000}K steps, no guidance"
    return Card(system, "SiT-B/2", steps, _PLAIN, fid, training=("--config.loss.accelerate=True",), tolerance=ROUGH)


CARDS: dict[str, Card] = {
    "sit-b": Card("SiT-B/2 without a head", **_B, sampling=_PLAIN, fid=33.02, training=_NO_HEAD),
    "sit-b-head2": Card(
        "SiT-B/2, head after block 2, no guidance", **_B, sampling=_PLAIN, fid=30.45, training=_head(2)
    ),
    "sit-b-head4": Card(
        "SiT-B/2, head after block 4, no guidance", **_B, sampling=_PLAIN, fid=30.60, training=_head(4)
    ),
    "sit-b-head8": Card(
        "SiT-B/2, head after block 8, no guidance", **_B, sampling=_PLAIN, fid=38.05, training=_head(8)
    ),
    "sit-b-ig-1.5": Card("SiT-B/2 + IG, w 1.5", **_B, sampling=(*_SDE, "--ig_scale=1.5"), fid=19.02),
    "sit-b-ig-1.9": Card("SiT-B/2 + IG, w 1.9", **_B, sampling=(*_SDE, "--ig_scale=1.9"), fid=17.38),
    "sit-b-ig": Card("SiT-B/2 + IG, w 2.3 on (0.3, 1]", **_B, sampling=("--preset=sit-b-ig",), fid=16.19),
    "sit-b-accelerated-50k": _accelerated(50_000, 84),
    "sit-b-accelerated-100k": _accelerated(100_000, 51),
    "sit-b-accelerated-200k": _accelerated(200_000, 29.5),
    "sit-b-accelerated-400k": _accelerated(400_000, 17.3),
    "sit-l-ig": Card("SiT-L/2 + IG, 400K steps", "SiT-L/2", 400_000, (*_SDE, "--ig_scale=1.4"), 8.5, tolerance=ROUGH),
    "sit-xl-ig-80": Card("SiT-XL/2 + IG, 80 epochs", "SiT-XL/2", 400_000, ("--preset=sit-xl-ig",), 5.31),
    "sit-xl-ig": Card(
        "SiT-XL/2 + IG, 800 epochs", **_XL, sampling=("--preset=sit-xl-ig",), **_paper(1.75, 4.98, 228.6, 0.80, 0.62)
    ),
    "sit-xl-ig-cfg": Card(
        "SiT-XL/2 + IG + CFG, 800 epochs",
        **_XL,
        sampling=("--preset=sit-xl-ig-cfg",),
        **_paper(1.46, 4.79, 265.7, 0.80, 0.64),
    ),
    "dit-b-ig": Card(
        "DiT-B/2 + IG, 400K steps", "DiT-B/2", 400_000, ("--solver=ddpm", "--steps=250"), 27, tolerance=ROUGH
    ),
    "dit-l-ig": Card(
        "DiT-L/2 + IG, 400K steps", "DiT-L/2", 400_000, ("--solver=ddpm", "--steps=250"), 11, tolerance=ROUGH
    ),
    "lightningdit-ig-60": Card(
        "LightningDiT-XL/1 + IG, 60 epochs", "LightningDiT-XL/1", 300_000, _IG, **_paper(2.42, 3.81, 173.7, 0.79, 0.62)
    ),
    "lightningdit-ig": Card(
        "LightningDiT-XL/1 + IG, 680 epochs", **_LDIT, sampling=_IG, **_paper(1.34, 3.94, 229.3, 0.78, 0.65)
    ),
    "lightningdit-ig-balanced": Card(
        "LightningDiT-XL/1 + IG, balanced labels", **_LDIT, sampling=_IG, fid=1.24, labels="balanced"
    ),
    "lightningdit-ig-cfg": Card(
        "LightningDiT-XL/1 + IG + CFG, 680 epochs", **_LDIT, sampling=_BOTH, **_paper(1.19, 4.11, 269.0, 0.79, 0.66)
    ),
    "lightningdit-ig-cfg-balanced": Card(
        "LightningDiT-XL/1 + IG + CFG, balanced labels", **_LDIT, sampling=_BOTH, fid=1.07, labels="balanced"
    ),
}


def card(name: str) -> Card:
    """A card by its name.  Raises: UserError for another."""
    check(name in CARDS, "--card", name, f"all, or one of {', '.join(CARDS)}")
    return CARDS[name]


def table() -> str:
    """All cards as a page."""
    head = ["card", "system", "paper: FID", "tolerance", "labels", "H100 hours", "here", "E@FID-2"]
    missing = "not run here"
    rows = [
        [f"`{name}`", c.system, f"{c.fid:g}", f"{c.tolerance:.0%}", c.labels, f"{c.hours:,.0f}", missing, missing]
        for name, c in CARDS.items()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])
