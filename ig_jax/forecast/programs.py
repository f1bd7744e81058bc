"""The programs of a run, compiled from shapes alone: the very train step and sampler that `train` and `sample` build."""

import dataclasses
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ig_jax.forecast import hlo
from ig_jax.forecast.targets import Target
from ig_jax.generation import generate
from ig_jax.models import dit
from ig_jax.parallel.sharding import batch_sharding, replicated, with_shardings
from ig_jax.training.memory import device_bytes
from ig_jax.training.state import TrainState

if TYPE_CHECKING:
    from ig_jax.config import Experiment

GIBI = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made; where it refused for want of memory, only the bytes it would have used."""

    seconds: float  # to trace, lower and compile
    used: int  # bytes on one device at once
    temporaries: int = 0
    donated: int = 0  # bytes of arguments that results take the place of
    program: hlo.Program | None = None  # None where it did not fit into the compiler's own limit


def lower_sampler(experiment: "Experiment", mesh: Mesh, batch_size: int) -> jax.stages.Lowered:
    """The sampler of an experiment's recipe on a mesh, for a global batch."""
    program = generate.Program.of(experiment.sample, experiment.model, experiment.process)
    params = with_shardings(dit.shapes(experiment.model), mesh)
    rows = jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=batch_sharding(mesh))
    seed = jax.ShapeDtypeStruct((), jnp.uint32, sharding=replicated(mesh))
    return generate.make_sampler(mesh, program).lower(params, {}, seed, rows, rows, experiment.sample.scales)


def compile_for(target: Target, lower) -> Compiled:
    """Compile what lower() gives, for a machine that need not be here."""
    began = time.monotonic()
    lowered = lower()
    try:
        compiled = lowered.compile(target.compiler_options)
    except jax.errors.JaxRuntimeError as error:
        # A TPU's compiler plans memory itself, and refuses with what it would use of what there is: of all, "Used
        # 20.51G of 15.75G hbm", or of temporaries alone, "HLO temporaries (26.82G) exceeds available HBM (15.75G)".
        sizes = re.findall(r"([\d.]+)([KMG])\b", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not sizes:
            raise
        return Compiled(time.monotonic() - began, max(int(float(size) * GIBI[unit]) for size, unit in sizes))
    memory = compiled.memory_analysis()
    used = (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes)
    return Compiled(time.monotonic() - began, used, memory.temp_size_in_bytes, memory.alias_size_in_bytes,
                    hlo.parse(compiled.as_text()))


def state_bytes(layout: TrainState, trains: Callable[[str], bool]) -> dict[str, int]:
    """Bytes on one device of what a run keeps, and of the gradient while a step has it."""
    trained = {name: leaf for name, leaf in layout.params.items() if trains(name)}
    return {"parameters": device_bytes(layout.params), "ema": device_bytes(layout.ema),
            "optimizer": device_bytes(layout.opt_state), "gradients": device_bytes(trained)}
