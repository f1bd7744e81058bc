"""AdamW against the rule of torch in float64, Muon against that of the release in torch, and untouched parameters."""

import dataclasses
import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from jax.sharding import NamedSharding, PartitionSpec

from ig_jax.base.errors import UserError
from ig_jax.base.schema import bind
from ig_jax.config.experiment import Experiment
from ig_jax.diffusion.loss import LossConfig
from ig_jax.diffusion.process import ProcessConfig
from ig_jax.interop import published
from ig_jax.models import dit, zoo
from ig_jax.optim.ema import EmaConfig
from ig_jax.optim.muon import orthogonalised, published_shape
from ig_jax.optim.optimizer import AdamWConfig, MuonConfig, learning_rate, make_optimizer
from ig_jax.parallel.mesh import make_mesh
from ig_jax.training.state import born_sharded, new_state, state_layout

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "muon_release.npz")
MODEL = dit.DiTConfig(
    **zoo.FAMILIES["sit"],
    input_size=4,
    channels=4,
    patch_size=2,
    depth=1,
    width=8,
    num_heads=1,
    mlp_ratio=4.0,
    num_classes=10,
    inter_depth=(1,),
    dtype="float32",
    scan_blocks=False,
    remat="none",
)
COMMON = dict(
    learning_rate=2e-3,
    schedule="constant",
    warmup_steps=0,
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.01,
    clip_norm=0.0,
    accumulate=1,
    train_only=(),
)
ADAMW = AdamWConfig(name="adamw", **COMMON)
HIDDEN = MuonConfig(name="muon", **COMMON, muon_momentum=0.95, muon_routing="hidden")
RELEASE = dataclasses.replace(HIDDEN, muon_routing="release")
LOSS = LossConfig(
    inter_weight=(0.5,),
    label_drop=0.1,
    accelerate=False,
    omega=0.0,
    gap_source="online",
    start_step=0,
    direction_weight=0.0,
    direction_intermediate=False,
)
PROCESS = ProcessConfig("linear", "velocity", "uniform", 0.0, 1.0)
EMA = EmaConfig(decays=(0.5, 0.9), warmup=False)


def steps_of(transformation, params, gradients):
    """The parameters after each gradient."""
    state, update = transformation.init(params), jax.jit(transformation.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        yield params


def adamw_of_torch(params, gradients, c):
    """torch.nn.utils.clip_grad_norm_ and torch.optim.AdamW, in float64."""
    params = {k: p.astype(np.float64) for k, p in params.items()}
    m, v = ({k: np.zeros_like(p) for k, p in params.items()} for _ in range(2))
    for t, gradient in enumerate(gradients, 1):
        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradient.values()))
        clip = min(1.0, c.clip_norm / (norm + 1e-6))
        for k, g in gradient.items():
            g = clip * g.astype(np.float64)
            m[k], v[k] = c.b1 * m[k] + (1 - c.b1) * g, c.b2 * v[k] + (1 - c.b2) * g * g
            step = m[k] / (1 - c.b1**t) / (np.sqrt(v[k] / (1 - c.b2**t)) + c.eps)
            params[k] = params[k] * (1 - c.learning_rate * c.weight_decay) - c.learning_rate * step
    return params


def test_four_steps_of_adamw_are_those_of_torch():
    rng = np.random.default_rng(0)
    draw = lambda scale: {
        k: scale * rng.standard_normal(s).astype(np.float32) for k, s in {"a.kernel": (7, 5), "a.bias": (5,)}.items()
    }
    config = dataclasses.replace(ADAMW, clip_norm=1.0, weight_decay=0.1, b2=0.999)
    params, gradients = draw(1.0), [draw(scale) for scale in (0.5, 0.01, 3.0, 0.1)]  # clipped and not
    *_, ours = steps_of(make_optimizer(config, 100, MODEL), params, gradients)
    for name, want in adamw_of_torch(params, gradients, config).items():
        np.testing.assert_allclose(ours[name], want, atol=1e-6)


def test_the_rate_warms_up_and_falls_along_a_cosine_to_zero():
    rate = learning_rate(dataclasses.replace(ADAMW, learning_rate=1.0, warmup_steps=4, schedule="cosine"), 12)
    assert [float(rate(jnp.int32(n))) for n in (0, 1, 3, 4, 8, 12)] == pytest.approx(
        [0.25, 0.5, 1, 1, 0.5, 0], abs=1e-6
    )


def test_the_rate_of_an_average_is_the_difference_to_one_and_not_its_rounding():
    ema = EmaConfig(decays=(0.9999, 0.999999), warmup=False)
    assert [float(ema.rate(name, jnp.int32(0))) for name in ema.names] == pytest.approx([1e-4, 1e-6], rel=1e-6)


def test_a_warm_average_has_a_short_memory_at_first():
    ema = EmaConfig(decays=(0.99,), warmup=True)
    assert [1 - float(ema.rate("0.99", jnp.int32(n))) for n in (0, 8, 10_000)] == pytest.approx(
        [0.1, 0.5, 0.99], abs=1e-6
    )


def golden(prefix):
    """A stored tree under our names and in our layout, float32."""
    names = {published.published_name(name, MODEL): name for name in dit.shapes(MODEL)}
    keys = [key for key in GOLDEN.files if key.startswith(f"{prefix}/")]
    stored = {names[key.removeprefix(f"{prefix}/")]: GOLDEN[key].astype(np.float32) for key in keys}
    return {name: jnp.asarray(published.to_ours(name, array)) for name, array in stored.items()}


def test_muon_of_the_release_after_one_and_three_steps():
    params = golden("start")
    assert {p.ndim for p in params.values()} == {1, 2} and "patch_embed.kernel" in params  # published 4-D
    still = {"pos_embed": jnp.zeros_like(params["pos_embed"])}  # the release sees a gradient of zero
    gradients = [golden(f"gradient{i}") | still for i in (1, 2, 3)]
    one, _, three = steps_of(make_optimizer(RELEASE, 100, MODEL), params, gradients)
    for ours, want in ((one, golden("after1")), (three, golden("after3"))):
        assert ours.keys() == want.keys()
        for name in want:
            # an update is about 1e-3
            np.testing.assert_allclose(ours[name], want[name], atol=2e-6, err_msg=name)


def test_scales_of_the_release():
    scale = lambda name, shape: published_shape(name, shape, 4).scale
    assert scale("blocks.0.attn.qkv.kernel", (8, 24)) == pytest.approx(3**0.5 * 0.2 * 24**0.5)
    assert scale("blocks.0.mlp.fc2.kernel", (32, 8)) == pytest.approx(0.2 * 32**0.5)
    # (D, C, P, P): flattened for the ratio, but its first two dimensions for the length
    assert scale("patch_embed.kernel", (16, 8)) == pytest.approx(0.2 * 8**0.5)
    assert scale("label_embed.table", (11, 8)) == pytest.approx((11 / 8) ** 0.5 * 0.2 * 11**0.5)


def test_orthogonalised_keeps_the_singular_vectors():
    matrix = jnp.asarray(np.random.default_rng(0).standard_normal((16, 48)), jnp.bfloat16)
    u, s, vt = np.linalg.svd(np.asarray(matrix, np.float32), full_matrices=False)
    middle = u.T @ np.asarray(orthogonalised(matrix), np.float32) @ vt.T
    assert np.diag(middle).min() > 0.6 and np.diag(middle).max() < 1.3
    assert abs(middle - np.diag(np.diag(middle))).max() < 0.05


def test_hidden_routing():
    rules = {name: HIDDEN.rule(name, len(leaf.shape)) for name, leaf in dit.shapes(MODEL).items()}
    matrices = [name for name, rule in rules.items() if rule == "muon"]
    assert len(matrices) == 5 * MODEL.depth
    assert all(name.startswith("blocks.") and name.endswith(".kernel") for name in matrices)
    for name in (
        "patch_embed.kernel",
        "label_embed.table",
        "final_head.linear.kernel",
        "blocks.0.attn.qkv.bias",
        "inter_heads.0.linear.kernel",
        "time_embed.fc1.kernel",
    ):
        assert rules[name] == "adamw"
    assert not HIDDEN.trains("pos_embed") and RELEASE.trains("pos_embed")


def run(config, steps):
    """The first state, the last, and (parameters, averages) after each of `steps` train steps on noise."""
    mesh = make_mesh(devices=jax.devices()[:1])
    transformation = make_optimizer(config, steps, MODEL)
    fresh = lambda: new_state(MODEL, config, transformation, EMA.names, 0, {})
    layout = state_layout(fresh, mesh)
    step = toy.train_step(
        transformation, model=MODEL, process=PROCESS, loss=LOSS, optimizer=config, ema=EMA, total_steps=steps
    ).jitted(layout, mesh)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((8, 4, 4, 4)).astype(np.float32)
    batch = {"latent": images, "label": np.arange(8, dtype=np.int32)}
    state, history = born_sharded(fresh, layout), []
    first = jax.device_get(state)
    for _ in range(steps):
        state, _ = step(state, batch)
        history.append(jax.device_get(state.params))
    return first, jax.device_get(state), history


@pytest.mark.parametrize("config", [HIDDEN, RELEASE], ids=["hidden", "release"])
def test_100_steps(config):
    first, last, history = run(config, 100)
    before, after = first.params["pos_embed"], last.params["pos_embed"]
    if config is RELEASE:
        np.testing.assert_allclose(after, before * (1 - 2e-3 * 0.01) ** 100, rtol=2e-5)
    else:
        for tree in (last.params, *last.ema.values()):
            assert (tree["pos_embed"] == before).all()
    moved = {name for name in first.params if (first.params[name] != last.params[name]).any()}
    assert moved >= first.params.keys() - {"pos_embed"}
    check_two_averages(first.params, history, last.ema)


def check_two_averages(first, history, ema):
    """Both are there after the run, each with its own decay."""
    for name, decay in (("0.5", 0.5), ("0.9", 0.9)):
        want = first
        for params in history:
            want = {k: decay * want[k] + (1 - decay) * params[k] for k in want}
        for key in want:
            np.testing.assert_allclose(ema[name][key], want[key], atol=2e-6)


@pytest.mark.parametrize("axis", [0, 1])
def test_sharded_muon_is_muon(axis):
    mesh = make_mesh(fsdp=8)
    rng = np.random.default_rng(0)
    draw = lambda: {f"blocks.{i}.a.kernel": rng.standard_normal((32, 64)).astype(np.float32) for i in range(2)}
    params, gradients = draw(), [draw(), draw()]
    spec = NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))
    *_, alone = steps_of(make_optimizer(HIDDEN, 2, MODEL), params, gradients)
    *_, cut = steps_of(make_optimizer(HIDDEN, 2, MODEL), *jax.device_put((params, gradients), spec))
    for name in alone:
        assert cut[name].sharding.is_equivalent_to(spec, 2)
        np.testing.assert_allclose(cut[name], alone[name], atol=1e-4)  # an update is about 3e-3


@pytest.fixture
def digits():
    path = Path(__file__).parents[2] / "configs" / "digits.py"
    return json.loads(runpy.run_path(path)["get_config"]().to_json())


MUON = dict(muon_momentum=0.95, muon_routing="hidden")


@pytest.mark.parametrize(
    "change,words",
    [
        (dict(name="sgd"), "config.optimizer.name='sgd' must be one of adamw, muon"),
        (dict(name="muon"), "config.optimizer.muon_momentum is missing"),
        (MUON, "config.optimizer.muon_momentum is not a setting that anything reads"),
        (MUON | dict(name="muon", muon_momentum=1.0), "config.optimizer.muon_momentum=1.0 must be in [0, 1)"),
        (MUON | dict(name="muon", muon_routing="all"), "muon_routing='all' must be hidden or release"),
        (dict(train_only=["inter_head"]), "optimizer.train_only='inter_head' must be a trainable part"),
        (dict(train_only=["pos_embed"]), "optimizer.train_only='pos_embed' must be a trainable part"),
        (dict(train_only=["blocks.60"]), "optimizer.train_only='blocks.60' must be a trainable part"),
        (dict(train_only=[1]), "config.optimizer.train_only=1 must be text"),
    ],
)
def test_bad_optimizers_are_refused(digits, change, words):
    digits["optimizer"] |= change
    with pytest.raises(UserError) as error:
        bind(Experiment, digits)
    assert words in str(error.value)


def test_muon_binds_and_comes_back(digits):
    digits["optimizer"] |= dict(name="muon", train_only=["blocks", "inter_heads"], **MUON)
    experiment = bind(Experiment, digits)
    assert isinstance(experiment.optimizer, MuonConfig)
    assert bind(Experiment, json.loads(json.dumps(experiment.as_dict()))) == experiment
    trains = experiment.optimizer.trains
    assert trains("blocks.5.mlp.fc1.bias") and not trains("final_head.linear.bias")
