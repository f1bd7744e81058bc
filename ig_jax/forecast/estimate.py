"""A roofline estimate of a program's time on a chip. It is an estimate: nothing ran.

Each instruction takes the longer of its products at the chip's rate and its bytes at the chip's bandwidth; what
devices exchange is added, as if nothing of it were hidden behind the rest.
"""

import dataclasses
from collections.abc import Iterable

from ig_jax.forecast.collectives import Collective
from ig_jax.forecast.work import Work
from ig_jax.parallel.chips import Chip

# What large products and copies reach of the datasheet: 790 of 989 TFLOP/s and 4.3 of 4.8 TB/s, measured on an
# H200, 798 of 989 on an H100. Taken for every chip; none of the others has been measured.
REACHED = 0.8
REACHED_BANDWIDTH = 0.9
REACHED_LINK = 0.8  # not measured
ASSUMPTIONS = (
    f"products at {REACHED:.0%} and memory at {REACHED_BANDWIDTH:.0%} of the datasheet, links at {REACHED_LINK:.0%}; "
    "collectives not hidden; launch gaps, data and host left out"
)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one run of a program on every device at once."""

    products: float  # instructions bound by matrix products
    memory: float  # instructions bound by memory
    exchange: float  # collectives
    floor: float  # products alone at the full datasheet rate

    @property
    def seconds(self) -> float:
        """All of it, one after the other."""
        return self.products + self.memory + self.exchange


def estimate(work: Iterable[Work], exchanges: Iterable[Collective], chip: Chip) -> Estimate:
    """The roofline of one device's work and exchanges on a chip."""
    products = memory = floor = 0.0
    for part in work:
        rate = chip.bfloat16 if part.dtype == "bf16" else chip.float32
        compute = part.flops / rate
        moving = part.traffic / (REACHED_BANDWIDTH * chip.bandwidth)
        floor += compute
        if compute / REACHED >= moving:
            products += compute / REACHED
        else:
            memory += moving
    sent = sum(exchange.sent for exchange in exchanges)
    return Estimate(products, memory, sent / (REACHED_LINK * chip.link), floor)
