"""Guidance rules: formula, interval and cost; a scale of 1 is bitwise the plain network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusal import refused
from small_network import CLASSES, SHAPE, network, oracle, two_heads, weak_network

from ig_jax.diffusion import guidance as rules
from ig_jax.diffusion import samplers
from ig_jax.diffusion.guidance import Guidance, Rule, guided_velocity, inside, scale_array, scale_at
from ig_jax.diffusion.recipe import Recipe

X = np.random.default_rng(1).normal(size=(3, *SHAPE)).astype(np.float32)
LABELS = np.array([0, 3, 7])
NULL = np.full(3, CLASSES)
T = 0.625


def guided(region, scales, model=network, weak=weak_network, **static):
    velocity = guided_velocity(model, CLASSES, Guidance(**static), scales, prefix=model, second=weak)
    return np.asarray(velocity(jnp.asarray(X), jnp.float32(T), jnp.asarray(LABELS), frozenset(region)))


def exact(head, labels=LABELS):
    return oracle(head, X, T, labels)


def internally_guided(labels=LABELS):
    return exact("inter", labels) + 1.7 * (exact("final", labels) - exact("inter", labels))


CASES = {
    "ig": (1.7, internally_guided),
    "cfg": (1.4, lambda: exact("final", NULL) + 1.4 * (exact("final") - exact("final", NULL))),
    "prefix": (1.3, lambda: exact("inter", NULL) + 1.3 * (exact("final") - exact("inter", NULL))),
    "auto": (2.1, lambda: exact("weak") + 2.1 * (exact("final") - exact("weak"))),
}


@pytest.mark.parametrize("name", CASES)
def test_formula(name):
    scale, expected = CASES[name]
    np.testing.assert_allclose(guided({name}, {name: scale}), expected(), atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_scale_one_is_bitwise_the_plain_network(name):
    plain = network(X, np.full(3, T, np.float32), LABELS).final
    np.testing.assert_array_equal(guided({name}, {name: 1.0}), plain)


def test_ig_goes_on_both_branches_of_cfg():
    expected = internally_guided(NULL) + 1.4 * (internally_guided() - internally_guided(NULL))
    np.testing.assert_allclose(guided({"ig", "cfg"}, {"ig": 1.7, "cfg": 1.4}), expected, atol=1e-5)


def test_every_other_guidance_adds_its_gap_from_the_internally_guided_velocity():
    strong, null = internally_guided(), internally_guided(NULL)
    cfg, prefix, auto = 0.4 * (strong - null), 0.3 * (strong - exact("inter", NULL)), 1.1 * (strong - exact("weak"))
    scales = {"ig": 1.7, "cfg": 1.4, "prefix": 1.3, "auto": 2.1}
    for region, want in (
        ({"ig", "cfg", "auto"}, strong + cfg + auto),
        ({"ig", "prefix"}, strong + prefix),
        ({"ig", "cfg", "prefix", "auto"}, strong + cfg + prefix + auto),
    ):
        np.testing.assert_allclose(guided(region, scales), want, atol=2e-5)


def test_first_three_channels_leave_the_others_conditional():
    out = guided({"cfg"}, {"cfg": 1.8}, cfg_channels="first_three")
    np.testing.assert_array_equal(out[..., 3:], guided({}, {})[..., 3:])
    np.testing.assert_allclose(out[..., :3], guided({"cfg"}, {"cfg": 1.8})[..., :3], atol=1e-6)


def doubled(network):
    """The network with its velocity once more, as variance."""

    def run(x, t, y):
        return jax.tree.map(lambda v: jnp.concatenate([v, v], -1), network(x, t, y))

    return run


@pytest.mark.parametrize("region", [{"ig", "cfg"}, {"prefix"}, {"auto"}], ids=["ig_cfg", "prefix", "auto"])
def test_variance_channels_are_never_guided(region):
    scales = dict.fromkeys(("ig", "cfg", "prefix", "auto"), 2.0)
    out = guided(region, scales, model=doubled(network), weak=doubled(weak_network))
    np.testing.assert_array_equal(out[..., 4:], network(X, np.full(3, T, np.float32), LABELS).final)
    np.testing.assert_allclose(out[..., :4], guided(region, scales), atol=1e-6)


@pytest.mark.parametrize(
    "head, weak", [(1, lambda: exact("deep")), ((0.25, 0.75), lambda: 0.25 * exact("inter") + 0.75 * exact("deep"))]
)
def test_any_head_or_a_blend_is_the_weak_output(head, weak):
    out = guided({"ig"}, {"ig": 1.5}, model=two_heads, head=head)
    np.testing.assert_allclose(out, weak() + 1.5 * (exact("final") - weak()), atol=1e-5)


@pytest.mark.parametrize(
    "text, at, value",
    [
        (1.5, 0.3, 1.5),
        ("1.5", 0.3, 1.5),
        ("0:1,0.5:2,1:1.5", 0.25, 1.5),
        ("0:1,0.5:2,1:1.5", 0.75, 1.75),
        ("0.2:3,0.4:1", 0.9, 1.0),
        ("linear:1,3", 0.25, 1.5),
        ("cosine:1,2", 0.5, 1.5),
        ("cosine:1,2", 1.0, 2.0),
    ],
)
def test_scales_as_people_write_them(text, at, value):
    assert float(scale_at(jnp.asarray(scale_array(text)), jnp.float32(at))) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("text", ["fast", "0:1,0", "cosine:1", -0.5, float("nan"), "0.5:1,0.2:2", "0:1,1.5:2", "1:2:3"])
def test_bad_scales_are_named(text):
    with refused("ig_scale", says=repr(text)):
        scale_array(text, "ig_scale")


def test_off():
    assert [Rule(scale).off for scale in (1.0, "0:1,1:1", "linear:1,1")] == [True] * 3
    assert [Rule(scale).off for scale in ("cosine:1,2", 0.0)] == [False] * 2


def test_intervals_are_half_open_and_reach_the_data():
    assert [inside(t, (0.3, 0.7)) for t in (0.3, 0.31, 0.7, 0.71)] == [False, True, True, False]
    assert inside(0.0, (0.0, 0.7)) and inside(0.1 + 0.2, (0.0, 0.3)) and not inside(0.1 + 0.2, (0.3, 1.0))


def test_edges_are_both_ends_of_the_intervals_of_what_is_used():
    recipe = Recipe.of(
        dict(
            solver="euler",
            steps=4,
            cfg_scale=2,
            ig_interval=(0.3, 0.9),
            cfg_interval=(0.1, 0.7),
            auto_interval=(0.2, 0.4),
        )
    )
    assert recipe.guidance.edges() == (0.1, 0.3, 0.7, 0.9)


def test_a_table_guides_each_step_by_its_own_scale():
    solver, x = samplers.Euler(), jnp.asarray(X)
    table = np.array([[0.0, 1.0], [1.0, 2.0]], np.float32)
    guidance = Guidance((("ig", (0.0, 1.0)),))
    velocity = guided_velocity(network, CLASSES, guidance, {"ig": table})
    ours = solver.integrate(velocity, x, jnp.asarray(LABELS), path="linear", steps=10, region=guidance.region).latents
    theirs = X.astype(np.float64)
    for t in np.arange(10, 0, -1) / 10:
        final, inter = (oracle(head, theirs, t, LABELS) for head in ("final", "inter"))
        theirs = theirs - 0.1 * (inter + (1 + t) * (final - inter))
    np.testing.assert_allclose(ours, theirs, atol=5e-5)


def test_a_sweep_of_numbers_or_of_tables_compiles_once():
    @jax.jit
    def run(scales):
        velocity = guided_velocity(network, CLASSES, Guidance(), scales)
        return velocity(jnp.asarray(X), jnp.float32(T), jnp.asarray(LABELS), frozenset({"ig", "cfg"}))

    for w in np.linspace(1, 3, 20):
        run({"ig": scale_array(w), "cfg": scale_array(2 * w)})
    assert run._cache_size() == 1
    for w in np.linspace(1, 3, 20):
        run({"ig": scale_array(f"0:1,1:{w}"), "cfg": scale_array(2 * w)})
    assert run._cache_size() == 2


@pytest.mark.parametrize("interval", [(0.5, 0.2), (0.0, 1.2), (-0.1, 1.0), (0.5, 0.5)])
@pytest.mark.parametrize("name", rules.RULES)
def test_bad_intervals_are_named(name, interval):
    with refused(f"{name}_interval", interval, expected="lo,hi", fix="t = 0 is data"):
        Recipe.of({"solver": "euler", "steps": 4, f"{name}_interval": interval})


@pytest.mark.parametrize(
    "static, name", [(dict(cfg_channels="three"), "cfg_channels"), (dict(head=(0.5, 0.6)), "ig_head")]
)
def test_bad_guidance_is_named(static, name):
    with refused(name):
        Guidance(**static)


def test_a_rule_of_ones_own_goes_through_recipe_and_sampler(own_rule):
    """Guidance against the label after this one, as an extension outside the package would register it."""
    recipe = Recipe.of(dict(solver="euler", steps=4, ig_scale=1.7, next_scale=1.6, next_interval=(0.3, 1.0)))
    assert Recipe.of(recipe.flat()) == recipe and recipe.flat()["next_interval"] == (0.3, 1.0)
    assert recipe.guidance.region(0.5) == {"ig", "next"} and recipe.guidance.region(0.2) == {"ig"}
    strong = internally_guided()
    expected = strong + 0.6 * (strong - exact("final", LABELS + 1))
    np.testing.assert_allclose(guided(recipe.guidance.region(0.5), recipe.scales), expected, atol=1e-5)
    assert recipe.evaluations_per_image("linear", None) == 4 + 3  # on at 1, 0.75 and 0.5


@pytest.fixture
def own_rule():
    weaker = lambda call: call.model(call.x, call.times, call.labels + 1).final
    rules.RULES["next"] = rules.Definition("Scale of guidance against the next label", weaker)
    yield weaker
    del rules.RULES["next"]
