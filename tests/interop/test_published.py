"""Published denoisers: full-size names and shapes, recognition, parity in every option, refusals."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from refusal import ANYTHING, refused

from ig_jax.interop import published, recognition
from ig_jax.interop.importing import ARITHMETIC
from ig_jax.interop.recognition import FileSettings
from ig_jax.models import dit, zoo

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
import full_size  # noqa: E402
import variants  # noqa: E402

NOTHING = FileSettings()
SMALL = json.loads((GOLDEN / "variants.json").read_text())


def recognised(shapes, stored=NOTHING, **choices) -> dit.DiTConfig:
    config = dit.DiTConfig(**recognition.recognise(shapes, stored, **choices), **ARITHMETIC)
    published.check_complete(shapes, config)
    return config


@pytest.mark.parametrize(
    "name, family, size, latent, extra",
    [
        ("ig_sit_b2", "sit", "B", (32, 4, 2), dict(inter_depth=(8,))),
        ("ig_sit_l2", "sit", "L", (32, 4, 2), {}),
        ("ig_sit_xl2", "sit", "XL", (32, 4, 2), {}),
        ("ig_lightningdit_xl1", "lightningdit", "XL", (16, 32, 1), {}),
        ("sit_xl2", "sit", "XL", (32, 4, 2), dict(inter_depth=(), sigma_channels="unused", clock="noise_at_0")),
        ("dit_xl2", "dit", "XL", (32, 4, 2), dict(inter_depth=())),
    ],
)
def test_full_size_checkpoints_are_recognised_by_names_and_shapes(name, family, size, latent, extra):
    shapes = full_size.shapes(name)
    config = recognised(shapes, family=family if "ig_" not in name else "")
    input_size, channels, patch = latent
    wanted = (
        zoo.settings(family, size)
        | dict(input_size=input_size, channels=channels, patch_size=patch, num_classes=1000, **ARITHMETIC)
        | extra
    )
    assert config == dit.DiTConfig(**wanted)
    assert published.published_shapes(config) == shapes
    buffers = sum(math.prod(shapes[name]) for name in published.ROPE_BUFFERS if name in shapes)
    assert sum(math.prod(shape) for shape in shapes.values()) - buffers == full_size.KEYS[name]["total_params"]


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_every_option_of_the_published_networks_agrees_to_rounding(name):
    settings, golden = variants.VARIANTS[name], np.load(GOLDEN / "variants.npz")
    shapes = {key: tuple(shape) for key, shape in SMALL[name].items()}
    stored = FileSettings(family=settings["code"], inter_depth=settings.get("head", 0))
    config = recognised(shapes, stored, num_heads=4)
    state = {key: lambda key=key, shape=shape: variants.weight(key, shape) for key, shape in shapes.items()}
    params = {key: jnp.asarray(array) for key, array in published.read_params(state, config)}
    x, t, y = variants.inputs(name)
    reversed_clock = settings["code"] != "dit" and config.clock == "noise_at_0"
    own = jnp.asarray(1 - t if reversed_clock else t)
    out = dit.apply(config, params, jnp.moveaxis(x, 1, -1), own, jnp.asarray(y))
    found = {"final": out.final} | ({"intermediate": out.intermediate[0]} if config.inter_depth else {})
    assert found.keys() == {key.split("/")[1] for key in golden if key.startswith(f"{name}/")}
    for key, array in found.items():
        want = np.moveaxis(golden[f"{name}/{key}"], 1, -1) * (-1 if reversed_clock else 1)
        np.testing.assert_allclose(array, want, atol=2e-5, rtol=0, err_msg=key)


def test_stored_rotary_tables_must_be_the_computed_ones():
    config = recognised({k: tuple(v) for k, v in SMALL["ldit_layernorm"].items()})
    tables, (cos, sin) = published.rope_buffers(config), published.ROPE_BUFFERS
    published.check_rope_buffers(tables, config)
    published.check_rope_buffers({cos: tables[cos].astype(jnp.bfloat16)}, config)
    with refused(f"tensor {sin}", says="another rotary embedding"):
        published.check_rope_buffers(tables | {sin: -tables[sin]}, config)


@pytest.mark.parametrize(
    "metadata, found",
    [
        (
            {
                "args": {"model": "SiT-XL/2", "path_type": "linear", "prediction": "v", "num_classes": 1000},
                "steps": 4_000,
            },
            FileSettings("sit", num_classes=1000, path="linear", clock="noise_at_1", prediction="velocity", step=4_000),
        ),
        (
            {"args": {"model": "SiT-B/4", "path_type": "GVP", "prediction": "noise", "encoder_depth": 4}},
            FileSettings("sit", inter_depth=4, path="cosine", clock="noise_at_0", prediction="noise"),
        ),
        ({"args": {"model": "DiT-L/2"}}, FileSettings("dit")),
        (
            {
                "config": {
                    "model": {"model_type": "LightningDiT-XL/1", "encoder_depth": 6, "use_rope": True},
                    "transport": {"path_type": "Linear", "prediction": "velocity"},
                    "data": {"num_classes": 100, "latent_multiplier": 0.5},
                }
            },
            FileSettings(
                "lightningdit",
                inter_depth=6,
                num_classes=100,
                rope=True,
                path="linear",
                clock="noise_at_0",
                prediction="velocity",
                latent_multiplier=0.5,
            ),
        ),
        (
            {
                "args": {"model": ["SiT"], "encoder_depth": "8", "path_type": {}, "num_heads": True},
                "config": 3,
                "steps": -1,
            },
            FileSettings(),
        ),
        ({"args": {"model": "UViT-H/2", "encoder_depth": 2**70, "path_type": "edm"}}, FileSettings()),
        ({}, FileSettings()),
    ],
)
def test_metadata_is_believed_only_where_it_has_the_published_form(metadata, found):
    assert FileSettings.of(metadata) == found


XL = full_size.shapes("ig_sit_xl2")
ORIGINAL = full_size.shapes("sit_xl2")
LIGHTNING = full_size.shapes("ig_lightningdit_xl1")


def without(shapes: dict, prefix: str) -> dict:
    return {name: shape for name, shape in shapes.items() if not name.startswith(prefix)}


def test_tensors_then_user_then_file_then_release_decide():
    assert recognised(XL).inter_depth == (8,)
    assert recognised(XL, FileSettings(inter_depth=6)).inter_depth == (6,)
    assert recognised(XL, FileSettings(inter_depth=6), inter_depth=4).inter_depth == (4,)
    assert recognised(XL, num_heads=8).num_heads == 8
    assert recognised(ORIGINAL, FileSettings(family="dit")).sigma_channels == "variance"
    assert recognised(ORIGINAL, FileSettings(path="cosine", clock="noise_at_0")).sigma_channels == "unused"
    assert recognised(XL, FileSettings(clock="noise_at_0")).clock == "noise_at_0"
    small = {key: tuple(shape) for key, shape in SMALL["sit_qk"].items()}
    assert recognised(small).num_heads == 4  # from the norm of one head
    wide = {key: tuple(shape) for key, shape in SMALL["ldit_no_rope"].items()}
    assert not recognised(wide).rope and recognised(wide, FileSettings(rope=True)).rope


MISSING = "in the file"


@pytest.mark.parametrize(
    "shapes, choices, name, value, words",
    [
        ({}, {}, "tensor", "pos_embed", "every SiT, DiT and LightningDiT checkpoint has it"),
        (ORIGINAL, {}, "--family", None, "both an original SiT and a DiT"),
        (XL, dict(family="lightningdit"), "--family", "lightningdit", "no tensor shows RoPE, RMSNorm or SwiGLU"),
        (XL, dict(family="uvit"), "--family", "uvit", "one of sit, dit, lightningdit"),
        (XL, dict(family="dit", stored=FileSettings(family="sit")), "--family", "dit", "sit, which the file stores"),
        (XL, dict(family="dit"), "tensor final_layer.linear.weight shape", ANYTHING, "give --family=sit"),
        (LIGHTNING, dict(family="sit"), "--family", "sit", "lightningdit, which the tensors are"),
        (LIGHTNING, dict(num_heads=12), "--num_heads", 12, "it fits --num_heads=16"),
        (ORIGINAL, dict(family="sit", inter_depth=8), "--inter_depth", 8, "no intermediate head"),
        (XL, dict(inter_depth=29), "inter_depth", 29, "in 1..28"),
        (XL | {"pos_embed": (1, 250, 1152)}, {}, "tokens of pos_embed", 250, "the square"),
        (XL | {"pos_embed": (256, 1152)}, {}, "tensor pos_embed shape", [256, 1152], "3 dimensions"),
        (XL | {"pos_embed": (1, 2**18, 0)}, {}, "tensor pos_embed shape", [1, 2**18, 0], "each in 1.."),
        (XL | {"pos_embed": (1, 2**18, 1152)}, {}, "pos_embed elements", 2**18 * 1152, "at most"),
        (XL | {"x_embedder.proj.weight": (0, 4, 2, 2)}, {}, "tensor x_embedder.proj.weight shape", ANYTHING, "in 1.."),
        (XL | {"x_embedder.proj.weight": (1000, 4, 2, 2)}, {}, "--num_heads", None, "give --num_heads"),
        (XL, dict(stored=FileSettings(num_classes=1001)), "rows of the label table", 1001, "the null label"),
        (
            XL | {"projectors.0.0.weight": (2, 1)},
            {},
            "tensor projectors.0.0.weight shape",
            [2, 1],
            "belongs to no part",
        ),
        (
            XL | {"blocks.7.attn.proj.weight": (1152, 1)},
            {},
            "tensor blocks.7.attn.proj.weight shape",
            [1152, 1],
            "[1152, 1152]",
        ),
        (without(XL, "blocks.27.mlp.fc2.bias"), {}, "tensor blocks.27.mlp.fc2.bias shape", "missing", "[1152]"),
        (without(XL, "blocks.3."), {}, "tensors", "blocks.3.*", MISSING),
        (XL | {f"blocks.{10**900}.attn.proj.weight": (1, 1)}, {}, "tensors", "blocks.28.*", MISSING),
        (without(XL, "blocks.0.mlp.fc2.weight"), {}, "tensor", "blocks.0.mlp.fc2.weight", MISSING),
        (XL | {"blocks.\u00b2.attn": (1,)}, {}, "tensor blocks.\u00b2.attn shape", [1], "belongs to no part"),
        (XL | {f"blocks.{i}.a": (1,) for i in range(40_000)}, {}, "blocks of the file", 40_000, "at most 100"),
    ],
)
def test_what_does_not_fit_is_named(shapes, choices, name, value, words):
    choices = dict(choices)
    stored = choices.pop("stored", FileSettings())
    with refused(name, value, says=words):
        recognised(shapes, stored, **choices)


def test_only_one_intermediate_head_has_a_published_form():
    config = dataclasses.replace(recognised(XL), inter_depth=(4, 8))
    with refused("inter_depth", (4, 8), expected="at most one intermediate head"):
        published.published_shapes(config)
