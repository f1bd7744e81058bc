"""The backbone against the published networks, and against its other forms."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusal import refused
from safetensors.numpy import load_file

from ig_jax.interop import published, recognition
from ig_jax.models import cost, cpu, dit, zoo

GOLDEN = Path(__file__).parents[1] / "golden"
RUNTIME = dict(dtype="float32", scan_blocks=False, remat="none")
TOLERANCE = 2e-5  # the published code agrees with its own float64 run to 2.5e-6


def channels_last(x):
    return jnp.asarray(np.moveaxis(x, 1, -1))


def load(name, family="", num_heads=4, inter_depth=0):
    """(config, params, reference arrays) of a published network with small random weights, none zero."""
    state = load_file(GOLDEN / f"{name}.safetensors")
    settings = recognition.recognise(
        {k: v.shape for k, v in state.items()}, family=family, num_heads=num_heads, inter_depth=inter_depth
    )
    config = dit.DiTConfig(**settings, **RUNTIME)
    published.check_complete({k: v.shape for k, v in state.items()}, config)
    params = {
        name: jnp.asarray(array)
        for name, array in published.read_params({k: (lambda v=v: v) for k, v in state.items()}, config)
    }
    return config, params, np.load(GOLDEN / f"{name}.npz")


@pytest.fixture(scope="module")
def sit():
    return load("sit_ig", inter_depth=2)


@pytest.fixture(scope="module")
def sit_inputs(sit):
    reference = sit[2]
    return channels_last(reference["x"]), jnp.asarray(reference["t"]), jnp.asarray(reference["y"])


@pytest.mark.parametrize("form", [{}, {"scan_blocks": True}, {"remat": "full"}, {"remat": "dots"}])
def test_sit_agrees_with_the_published_network_in_every_form(sit, sit_inputs, form):
    config, params, reference = sit
    out = dit.apply(dataclasses.replace(config, **form), params, *sit_inputs)
    assert abs(channels_last(reference["out"]) - out.final).max() < TOLERANCE
    assert abs(channels_last(reference["intermediate"]) - out.intermediate[0]).max() < TOLERANCE


def test_lightningdit_agrees_with_the_published_network():
    config, params, reference = load("ldit_ig", inter_depth=2)
    x, y = channels_last(reference["z"]), jnp.asarray(reference["y"])
    out = dit.apply(config, params, x, 1 - jnp.asarray(reference["fwd/t"]), y)  # its clock has noise at 0
    assert abs(channels_last(-reference["fwd/out"]) - out.final).max() < TOLERANCE
    assert abs(channels_last(-reference["fwd/intermediate"]) - out.intermediate[0]).max() < TOLERANCE


def test_original_sit_agrees_with_the_published_network():
    config, params, reference = load("sit_orig", family="sit")
    out = dit.apply(
        config, params, channels_last(reference["x"]), 1 - jnp.asarray(reference["t"]), jnp.asarray(reference["y"])
    )
    assert abs(channels_last(-reference["out"]) - out.final).max() < TOLERANCE
    assert out.intermediate == ()


def test_original_dit_agrees_with_the_published_network():
    config, params, reference = load("dit_orig", family="dit")
    t = jnp.asarray(reference["t"], jnp.float32)
    out = dit.apply(config, params, channels_last(reference["x"]), t, jnp.asarray(reference["y"]))
    assert out.final.shape[-1] == 2 * config.channels  # noise and variance
    assert abs(channels_last(reference["out"]) - out.final).max() < TOLERANCE


def test_initial_positions_are_the_published_ones(sit):
    config, params, _ = sit
    fresh = dit.init(config, jax.random.key(0))
    assert (fresh["pos_embed"] == params["pos_embed"]).all()


def test_a_fresh_network_predicts_zero_and_has_the_published_spread():
    config = dit.DiTConfig(
        **zoo.settings("sit", "S"), input_size=8, channels=4, patch_size=2, num_classes=10, **RUNTIME
    )
    params = dit.init(config, jax.random.key(0))
    x = jnp.ones((2, 8, 8, 4))
    out = dit.apply(config, params, x, jnp.array([0.2, 0.9]), jnp.array([0, 10]))
    assert (out.final == 0).all() and (out.intermediate[0] == 0).all()
    assert params["label_embed.table"].std() == pytest.approx(0.02, rel=0.05)
    assert params["time_embed.fc1.kernel"].std() == pytest.approx(0.02, rel=0.05)
    limit = np.sqrt(6 / (384 + 3 * 384))
    assert abs(params["blocks.0.attn.qkv.kernel"]).max() == pytest.approx(limit, rel=1e-3)


def test_a_fresh_lightningdit_has_the_published_spread():
    settings = zoo.settings("lightningdit", "S") | dict(depth=4)
    config = dit.DiTConfig(**settings, input_size=8, channels=32, patch_size=1, num_classes=10, **RUNTIME)
    params = dit.init(config, jax.random.key(0))
    assert not params["final_head.linear.kernel"].any()
    for name in ("inter_heads.0.linear.kernel", "inter_heads.0.modulation.linear.kernel", "patch_embed.kernel"):
        assert abs(params[name]).max() == pytest.approx(np.sqrt(6 / sum(params[name].shape)), rel=1e-2)
    assert params["time_embed.fc2.kernel"].std() == pytest.approx(0.02, rel=0.05)


def test_positions_have_no_gradient(sit, sit_inputs):
    config, params, _ = sit
    gradient = jax.grad(lambda p: (dit.apply(config, p, *sit_inputs).final ** 2).sum())(params)
    assert not gradient["pos_embed"].any() and gradient["patch_embed.bias"].any()


@pytest.mark.parametrize("scan", [False, True])
def test_several_heads_agree_with_single_head_networks(sit, sit_inputs, scan):
    config, params, _ = sit
    head = {k.removeprefix("inter_heads.0."): v for k, v in params.items() if k.startswith("inter_heads.0.")}
    body = {k: v for k, v in params.items() if not k.startswith("inter_heads.")}
    three = dataclasses.replace(config, inter_depth=(1, 2, 4), scan_blocks=scan)
    many = dit.apply(three, body | {f"inter_heads.{i}.{k}": v for i in range(3) for k, v in head.items()}, *sit_inputs)
    for i, depth in enumerate(three.inter_depth):
        one = dit.apply(dataclasses.replace(config, inter_depth=(depth,), scan_blocks=scan), params, *sit_inputs)
        np.testing.assert_allclose(many.intermediate[i], one.intermediate[0], atol=2e-6)
        np.testing.assert_allclose(many.final, one.final, atol=2e-6)
    none = dit.apply(dataclasses.replace(config, inter_depth=()), body, *sit_inputs)
    np.testing.assert_allclose(none.final, many.final, atol=2e-6)


def test_a_head_leaves_other_outputs_bitwise_identical(sit, sit_inputs):
    config, params, _ = sit
    second = {k.replace(".0.", ".1.", 1): v + 1 for k, v in params.items() if k.startswith("inter_heads.0.")}
    body = {k: v for k, v in params.items() if not k.startswith("inter_heads.")}
    networks = [((), body), ((2,), params), ((2, 3), params | second)]
    none, one, two = (
        jax.jit(functools.partial(dit.apply, dataclasses.replace(config, inter_depth=depths)))(weights, *sit_inputs)
        for depths, weights in networks
    )
    assert (none.final == one.final).all() and (two.final == one.final).all()
    assert (two.intermediate[0] == one.intermediate[0]).all()


def test_bfloat16_products_stay_close_to_float32(sit, sit_inputs):
    config, params, reference = sit
    out = dit.apply(dataclasses.replace(config, dtype="bfloat16"), params, *sit_inputs)
    assert out.final.dtype == jnp.float32
    for got, name in ((out.final, "out"), (out.intermediate[0], "intermediate")):
        want = channels_last(reference[name])
        error = jnp.sqrt(jnp.mean((got - want) ** 2) / jnp.mean(want**2))
        assert 1e-5 < error < 0.01  # 8 bits of mantissa over 4 blocks; exactly equal would mean no bfloat16


def test_kernels_cast_beforehand_give_bitwise_identical_outputs(sit, sit_inputs):
    config, params, _ = sit
    config = dataclasses.replace(config, dtype="bfloat16")
    cast = dit.cast_kernels(config, params)
    left = {name for name, value in cast.items() if value.ndim > 1 and value.dtype == jnp.float32}
    assert left == {"time_embed.fc1.kernel", "time_embed.fc2.kernel", "label_embed.table", "pos_embed"}
    run = jax.jit(functools.partial(dit.apply, config))
    jax.tree.map(np.testing.assert_array_equal, run(cast, *sit_inputs), run(params, *sit_inputs))


@pytest.mark.parametrize("images,groups", [(4, []), (12, [3]), (10, [5]), (13, [])])  # groups of 4, 2; of 1 is too few
@pytest.mark.parametrize("until_head", [None, 0])
def test_few_images_at_a_time_are_the_same_network(sit, monkeypatch, images, groups, until_head):
    config, params, _ = sit
    monkeypatch.setattr(cpu, "CACHE", 4 * 4 * config.side**2 * config.mlp_hidden)  # four images of float32
    x = jax.random.normal(jax.random.key(0), (images, config.input_size, config.input_size, config.channels))
    args = x, jnp.linspace(0.0, 1.0, images), jnp.arange(images) % (config.num_classes + 1)
    forward, apply = (functools.partial(f, config, params, until_head=until_head) for f in (dit.forward, dit.apply))
    loops = [e.params["length"] for e in jax.make_jaxpr(forward)(*args).eqns if e.primitive.name == "scan"]
    assert loops == groups
    got, want = jax.jit(forward)(*args), jax.jit(apply)(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), got, want)  # as far as products move
    assert got.intermediate[0].shape == x.shape


@pytest.mark.parametrize(
    "size,share,macs", [("B", 0.00915, 23.01e9), ("L", 0.00462, 80.70e9), ("XL", 0.00396, 118.62e9)]
)
def test_cost_of_the_published_sizes(size, share, macs):
    config = dit.DiTConfig(
        **zoo.settings("sit", size), input_size=32, channels=4, patch_size=2, num_classes=1000, **RUNTIME
    )
    assert cost.head_parameter_share(config) == pytest.approx(share, abs=1e-5)
    assert cost.forward_macs(config) == pytest.approx(macs, rel=1e-3)


def test_flops_count_agrees_with_the_compiler(sit, sit_inputs):
    config, params, _ = sit
    compiled = jax.jit(dit.apply, static_argnums=0).lower(config, params, *sit_inputs).compile()
    ours = 2 * cost.forward_macs(config) * len(sit_inputs[0])
    assert ours <= compiled.cost_analysis()["flops"] <= 1.12 * ours  # the compiler adds norms and activations


@pytest.mark.parametrize(
    "change, name, expected",
    [
        ({"inter_depth": (5,)}, "inter_depth", "in 1..4"),
        ({"inter_depth": (0,)}, "inter_depth", "in 1..4"),
        ({"inter_depth": (2, 2)}, "inter_depth", "without repeats"),
        ({"num_heads": 5}, "width", "a multiple of num_heads=5"),
        ({"patch_size": 3}, "input_size", "a multiple of patch_size=3"),
        ({"depth": 0}, "depth", "at least 1"),
        ({"norm": "batchnorm"}, "norm", "one of layernorm, rmsnorm"),
        ({"mlp_ratio": -1.0}, "mlp_ratio", "greater than 0"),
    ],
)
def test_impossible_networks_are_refused(sit, change, name, expected):
    with refused(name, expected=expected):
        dataclasses.replace(sit[0], **change)
