"""Each guidance is its formula, its interval and its cost; a scale of 1 is the plain network to the bit."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_network import CLASSES, SHAPE, network, oracle, two_heads, weak_network

from ig_jax.diffusion import samplers
from ig_jax.diffusion.guidance import (
    Guidance,
    Region,
    Scales,
    guided_velocity,
    inside,
    is_off,
    scale_array,
    scale_at,
)
from ig_jax.errors import UserError

X = np.random.default_rng(1).normal(size=(3, *SHAPE)).astype(np.float32)
LABELS = np.array([0, 3, 7])
NULL = np.full(3, CLASSES)
T = 0.625


def guided(region, scales, model=network, weak=weak_network, **static):
    velocity = guided_velocity(model, jnp.asarray(LABELS), CLASSES, Guidance(**static), scales, prefix=model, weak=weak)
    return np.asarray(velocity(jnp.asarray(X), jnp.float32(T), region))


def say(head, labels=LABELS):
    return oracle(head, X, T, labels)


def internally_guided(labels=LABELS):
    return say("inter", labels) + 1.7 * (say("final", labels) - say("inter", labels))


OFF = Region(ig=False, cfg=False)
CASES = {
    "ig": (Region(True, False), Scales(ig=1.7), internally_guided),
    "cfg": (Region(False, True), Scales(cfg=1.4), lambda: say("final", NULL) + 1.4 * (say("final") - say("final", NULL))),
    "prefix": (Region(False, False, prefix=True), Scales(prefix=1.3),
               lambda: say("inter", NULL) + 1.3 * (say("final") - say("inter", NULL))),
    "auto": (Region(False, False, auto=True), Scales(auto=2.1),
             lambda: say("weak") + 2.1 * (say("final") - say("weak"))),
}


@pytest.mark.parametrize("name", CASES)
def test_formula(name):
    region, scales, expected = CASES[name]
    np.testing.assert_allclose(guided(region, scales), expected(), atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_scale_one_is_the_plain_network_to_the_bit(name):
    np.testing.assert_array_equal(guided(CASES[name][0], Scales()), network(X, np.full(3, T, np.float32), LABELS).final)


def test_ig_goes_on_both_branches_of_cfg():
    expected = internally_guided(NULL) + 1.4 * (internally_guided() - internally_guided(NULL))
    np.testing.assert_allclose(guided(Region(True, True), Scales(ig=1.7, cfg=1.4)), expected, atol=1e-5)


def test_every_other_guidance_adds_its_gap_from_the_internally_guided_velocity():
    strong, null = internally_guided(), internally_guided(NULL)
    cfg, prefix, auto = 0.4 * (strong - null), 0.3 * (strong - say("inter", NULL)), 1.1 * (strong - say("weak"))
    scales = Scales(ig=1.7, cfg=1.4, prefix=1.3, auto=2.1)
    for region, want in ((Region(True, True, auto=True), strong + cfg + auto),
                         (Region(True, False, prefix=True), strong + prefix),
                         (Region(True, True, prefix=True, auto=True), strong + cfg + prefix + auto)):
        np.testing.assert_allclose(guided(region, scales), want, atol=2e-5)


def test_first_three_channels_leave_the_others_conditional():
    out = guided(Region(False, True), Scales(cfg=1.8), cfg_channels="first_three")
    np.testing.assert_array_equal(out[..., 3:], guided(OFF, Scales())[..., 3:])
    np.testing.assert_allclose(out[..., :3], guided(Region(False, True), Scales(cfg=1.8))[..., :3], atol=1e-6)


def doubled(network):
    """The network with its velocity once more, as variance."""

    def run(x, t, y):
        return jax.tree.map(lambda v: jnp.concatenate([v, v], -1), network(x, t, y))

    return run


@pytest.mark.parametrize("region", [
    Region(True, True), Region(False, False, prefix=True), Region(False, False, auto=True)], ids=["ig_cfg", "prefix", "auto"])
def test_variance_channels_are_never_guided(region):
    scales = Scales(ig=2.0, cfg=2.0, prefix=2.0, auto=2.0)
    out = guided(region, scales, model=doubled(network), weak=doubled(weak_network))
    np.testing.assert_array_equal(out[..., 4:], network(X, np.full(3, T, np.float32), LABELS).final)
    np.testing.assert_allclose(out[..., :4], guided(region, scales), atol=1e-6)


@pytest.mark.parametrize("head, weak", [
    (1, lambda: say("deep")), ((0.25, 0.75), lambda: 0.25 * say("inter") + 0.75 * say("deep"))])
def test_any_head_or_a_blend_is_the_weak_output(head, weak):
    out = guided(Region(True, False), Scales(ig=1.5), model=two_heads, head=head)
    np.testing.assert_allclose(out, weak() + 1.5 * (say("final") - weak()), atol=1e-5)


@pytest.mark.parametrize("text, at, value", [
    (1.5, 0.3, 1.5), ("1.5", 0.3, 1.5), ("0:1,0.5:2,1:1.5", 0.25, 1.5), ("0:1,0.5:2,1:1.5", 0.75, 1.75),
    ("0.2:3,0.4:1", 0.9, 1.0), ("linear:1,3", 0.25, 1.5), ("cosine:1,2", 0.5, 1.5), ("cosine:1,2", 1.0, 2.0)])
def test_scales_as_people_write_them(text, at, value):
    assert float(scale_at(jnp.asarray(scale_array(text)), jnp.float32(at))) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("text", ["fast", "0:1,0", "cosine:1", -0.5, float("nan"), "0.5:1,0.2:2", "0:1,1.5:2", "1:2:3"])
def test_bad_scales_are_named(text):
    with pytest.raises(UserError, match="ig_scale"):
        scale_array(text, "ig_scale")


def test_off():
    assert is_off(1.0) and is_off("0:1,1:1") and is_off("linear:1,1") and not is_off("cosine:1,2") and not is_off(0.0)


def test_intervals_are_half_open_and_reach_the_data():
    assert [inside(t, (0.3, 0.7)) for t in (0.3, 0.31, 0.7, 0.71)] == [False, True, True, False]
    assert inside(0.0, (0.0, 0.7)) and inside(0.1 + 0.2, (0.0, 0.3)) and not inside(0.1 + 0.2, (0.3, 1.0))


def test_edges_are_both_ends_of_the_intervals_of_what_is_used():
    guidance = Guidance(ig_interval=(0.3, 0.9), cfg_interval=(0.1, 0.7), auto_interval=(0.2, 0.4), use_cfg=True)
    assert guidance.edges() == (0.1, 0.3, 0.7, 0.9)


def test_a_table_guides_each_step_by_its_own_scale():
    solver, x = samplers.Euler(), jnp.asarray(X)
    table = np.array([[0.0, 1.0], [1.0, 2.0]], np.float32)
    guidance = Guidance()
    velocity = guided_velocity(network, jnp.asarray(LABELS), CLASSES, guidance, Scales(ig=table))
    ours = samplers.integrate(solver, solver.rows("linear", 10), velocity, x, region=guidance.region)
    theirs = X.astype(np.float64)
    for t in np.arange(10, 0, -1) / 10:
        final, inter = (oracle(head, theirs, t, LABELS) for head in ("final", "inter"))
        theirs = theirs - 0.1 * (inter + (1 + t) * (final - inter))
    np.testing.assert_allclose(ours, theirs, atol=5e-5)


def test_a_sweep_of_numbers_or_of_tables_compiles_once():
    @jax.jit
    def run(scales):
        velocity = guided_velocity(network, jnp.asarray(LABELS), CLASSES, Guidance(use_cfg=True), scales)
        return velocity(jnp.asarray(X), jnp.float32(T), Region(True, True))

    for w in np.linspace(1, 3, 20):
        run(Scales(scale_array(w), scale_array(2 * w), scale_array(1), scale_array(1)))
    assert run._cache_size() == 1
    for w in np.linspace(1, 3, 20):
        run(Scales(scale_array(f"0:1,1:{w}"), scale_array(2 * w), scale_array(1), scale_array(1)))
    assert run._cache_size() == 2


@pytest.mark.parametrize("static, name", [
    (dict(ig_interval=(0.5, 0.2)), "ig_interval"), (dict(cfg_interval=(0.0, 1.2)), "cfg_interval"),
    (dict(prefix_interval=(-0.1, 1.0)), "prefix_interval"), (dict(auto_interval=(0.5, 0.5)), "auto_interval"),
    (dict(cfg_channels="three"), "cfg_channels"), (dict(head=(0.5, 0.6)), "ig_head"),
])
def test_bad_guidance_is_named(static, name):
    with pytest.raises(UserError, match=name):
        Guidance(**static)
