"""FLOPs counted from the config, against the compiler's count and the matrix products of the traced program."""

import math

import bench_fakes
import jax
import numpy as np
import pytest
from traced import inside

from ig_jax.benchmarking import cases, programs
from ig_jax.generation import sampler as generate
from ig_jax.models import cost, dit
from ig_jax.training.program import TrainProgram


def small(**changes) -> cases.Case:
    """SiT of width 216 on one device: wide enough that products outweigh the rest."""
    return bench_fakes.case(**{"width": 216, "depth": 3, "latent": 16} | changes)


def products(jaxpr) -> int:
    """FLOPs of all matrix products of a jaxpr, a loop's body once for each round."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
        total += equation.params.get("length", 1) * sum(map(products, inside(equation)))
    return total


def traced_step(case: cases.Case):
    mesh = programs.mesh_of(case)
    program = TrainProgram.of(case.experiment, mesh, case.experiment.batch_spec, case.batch)
    return program.step.trace(program.layout, programs.synthetic_batch(program, case))


def step_flops(case: cases.Case) -> int:
    return cost.train_step_flops(case.experiment.model, case.batch, ema_forward=case.experiment.loss.ema_forward)


@pytest.mark.parametrize("changes", [{}, {"scan": True}, {"dtype": "bfloat16"}], ids=str)
def test_a_train_step_has_the_products_that_are_counted(changes):
    case = small(**changes)
    counted = products(traced_step(case).jaxpr.jaxpr)
    # Counted as three forward passes. Patches and times need no gradient, and a kernel of attention may compute
    # its scores again in the backward pass.
    assert 0.98 < counted / step_flops(case) < 1.02


def test_the_compiler_counts_the_same_for_an_unrolled_step():
    case = small(depth=1)
    compiled = traced_step(case).lower().compile().cost_analysis()["flops"]
    # It also counts what is no product: norms, softmax, GELU, the optimizer, the choice of a step or none by parameter.
    assert 0.97 < compiled / step_flops(case) < 1.15


@pytest.mark.parametrize(
    "recipe,evaluations",
    [
        ({"cfg_scale": 1.0, "steps": 10}, 10.0),  # internal guidance is free
        ({"steps": 10}, 17.0),  # CFG doubles the 7 steps with t <= 0.7
        ({"cfg_interval": (0.0, 1.0), "steps": 10}, 20.0),
        ({"solver": "heun", "cfg_scale": 1.0, "steps": 10}, 19.0),
    ],
    ids=str,
)
def test_a_sampler_has_the_products_of_its_evaluations(recipe, evaluations):
    case = small(**recipe)
    e = case.experiment
    program = generate.Program.of(e.sample, e.model, e.process)
    sampler = generate.make_sampler(programs.mesh_of(case), program)
    labels = jax.ShapeDtypeStruct((case.batch,), np.int32)
    traced = sampler.trace(dit.shapes(e.model), {}, np.uint32(0), labels, labels, e.sample.scales)
    assert e.sample.evaluations_per_image(e.process.kind, e.model) == evaluations
    assert products(traced.jaxpr.jaxpr) == cost.sample_flops(e.model, case.batch, evaluations)


def test_the_paper_s_sampler_costs_422_evaluations():
    e = cases.published("SiT-XL/2").experiment
    assert e.sample.evaluations_per_image(e.process.kind, e.model) == 422
    assert round(cost.forward_macs(e.model) / 1e9, 2) == 118.62
