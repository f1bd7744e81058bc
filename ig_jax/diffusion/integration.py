"""The contract of all solvers, their registry, and integration over a fixed time grid.

A solver is a frozen dataclass under a name; its fields are its options, and each becomes a key of a recipe and a
command-line flag by itself. To add one, write the class (over a fixed grid: its `rows`) and register it.
"""

import dataclasses
import inspect
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

Region = Any  # hashable and static: the guidance rules that are on at a time
Field = Callable[[Any, Any, Any, Region], Any]  # (x (B, H, W, C), t, labels (B,), region) -> slope, or a chain's pair


# The region and the cost, in forward passes, of a field without guidance.
nowhere: Callable[[float], Region] = lambda t: frozenset()
one_pass: Callable[[Region], float] = lambda region: 1.0


class Integrated(NamedTuple):
    """Where an integration ended, and its cost.

    Attributes:
        latents: (B, H, W, C) float32; NaN where an adaptive solver ran out of steps.
        evaluations: (B,) float32, forward passes of the model for each image; None for none.
    """

    latents: jax.Array
    evaluations: jax.Array | None


class Solver:
    """A numerical method that takes noise to data, or back; a subclass declares what is different for it."""

    name: ClassVar[str]  # given by `register`
    order: ClassVar[int]  # global error ~ step^order (of an SDE: of its drift)
    adaptive: ClassVar[bool] = False  # chooses its steps while it runs
    has_memory: ClassVar[bool] = False  # carries more than the latents from step to step
    reversible: ClassVar[bool] = False  # can run from data to noise
    chain: ClassVar[bool] = False  # samples DiT's discrete chain (diffusion/gaussian.py) instead of a path
    least_steps: ClassVar[int] = 1

    @property
    def stochastic(self) -> bool:
        """Whether the solver adds noise on its way."""
        return False

    def integrate(
        self,
        field: Field,
        x: jax.Array,
        labels: jax.Array,
        *,
        path: str,
        steps: int,
        region: Callable[[float], Region] = nowhere,
        edges: tuple[float, ...] = (),
        noise: Callable[[jax.Array], jax.Array] | None = None,
        cost: Callable[[Region], float] = one_pass,
        reverse: bool = False,
    ) -> Integrated:
        """Latents at the end from latents x (B, H, W, C) float32 at the beginning, for labels (B,) int32.

        `field(x, t, labels, region)` is the field, `region(t)` its region at sigma-time t, which changes at `edges`
        only; `noise(step)` is a standard normal (B, H, W, C) for a stochastic solver; `cost(region)` is the price of
        one evaluation; `reverse` runs from data to noise.
        """
        raise NotImplementedError


SOLVERS: dict[str, type[Any]] = {}  # by name; diffusion/solvers.py has them all
Class = TypeVar("Class", bound=type[Solver])


def register(name: str) -> Callable[[Class], Class]:
    """A class decorator that makes a solver known under `name` to recipes, configs and flags."""

    def add(solver: Class) -> Class:
        solver.name = name
        cls: Any = solver
        options = [f"    {field.name}: {field.metadata['help']}" for field in dataclasses.fields(cls)]
        solver.__doc__ = "\n".join([inspect.cleandoc(solver.__doc__ or ""), "", "Attributes:", *options])
        SOLVERS[name] = solver
        return solver

    return add


def option(default, doc: str) -> Any:
    """A field of a solver with the one-line help of its flag."""
    return dataclasses.field(default=default, metadata={"help": doc})


@dataclasses.dataclass(frozen=True)
class Row:
    """One step of a grid.

    Attributes:
        update: (state, fields, c, noise) -> state, with one field for each time in `guided_at`.
        guided_at: sigma-time at which each evaluation of this step looks up its guidance.
        coefficients: what `update` reads from c, float64.
    """

    update: Callable
    guided_at: tuple[float, ...]
    coefficients: dict[str, float]


class FixedGrid(Solver):
    """A solver over rows that are known before it runs: coefficients are computed in float64 on the host.

    The rows are cut where the update or the guidance region changes, and each group runs as one `lax.scan`: a doubled
    batch runs only inside its interval, and no loop has a branch.
    """

    def rows(self, path: str, steps: int, reverse: bool = False) -> list[Row]:
        """The steps in the order of integration."""
        raise NotImplementedError

    def start(self, x):
        """The state of the first step; latents, unless the solver has memory."""
        return x

    def finish(self, state):
        """The latents of a state."""
        return state

    def integrate(
        self, field, x, labels, *, path, steps, region=nowhere, edges=(), noise=None, cost=one_pass, reverse=False
    ):
        rows = self.rows(path, steps, reverse=True) if reverse else self.rows(path, steps)
        passes = sum(cost(region(t)) for row in rows for t in row.guided_at)
        state, _ = self.visit(rows, field, x, labels, region=region, noise=noise)
        return Integrated(self.finish(state), jnp.full(len(labels), passes, jnp.float32))

    def visit(
        self,
        rows: list[Row],
        field: Field,
        x: jax.Array,
        labels: jax.Array,
        *,
        region: Callable[[float], Region] = nowhere,
        noise: Callable[[jax.Array], jax.Array] | None = None,
        seen: Callable[[Any], Any] = lambda state: None,
    ) -> tuple[Any, list[Any]]:
        """(state at the end, what `seen` makes of the state before each step: a stack for each group of rows).

        x: latents (B, H, W, C) float32, from which the first of the rows goes on.
        """
        state, done, found = self.start(x), 0, []
        kinds = [(row.update, tuple(region(t) for t in row.guided_at)) for row in rows]
        for (update, regions), alike in itertools.groupby(kinds):
            group = rows[done : done + len(list(alike))]
            fields = [lambda x, t, region=region: field(x, t, labels, region) for region in regions]

            def step(state, row, update=update, fields=fields):
                index, coefficients = row
                increment = noise(index) if noise is not None and self.stochastic else None
                return update(state, fields, SimpleNamespace(**coefficients), increment), seen(state)

            names = group[0].coefficients
            table = {name: jnp.asarray([row.coefficients[name] for row in group], jnp.float32) for name in names}
            state, states = jax.lax.scan(step, state, (done + jnp.arange(len(group)), table))
            found.append(states)
            done += len(group)
        return state, found
