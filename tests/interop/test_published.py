"""Published denoisers: full-size names and shapes, recognition, parity in every option, refusals."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from ig_jax.errors import UserError
from ig_jax.interop import claims, published, recognition
from ig_jax.interop.claims import Claims
from ig_jax.interop.experiment import ARITHMETIC
from ig_jax.models import dit, zoo

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
import full_size  # noqa: E402
import variants  # noqa: E402

SMALL = json.loads((GOLDEN / "variants.json").read_text())


def recognised(shapes, said=Claims(), **choices) -> dit.DiTConfig:
    config = dit.DiTConfig(**recognition.recognise(shapes, said, **choices), **ARITHMETIC)
    published.check_complete(shapes, config)
    return config


@pytest.mark.parametrize("name, family, size, latent, extra", [
    ("ig_sit_b2", "sit", "B", (32, 4, 2), dict(inter_depth=(8,))),
    ("ig_sit_l2", "sit", "L", (32, 4, 2), {}),
    ("ig_sit_xl2", "sit", "XL", (32, 4, 2), {}),
    ("ig_lightningdit_xl1", "lightningdit", "XL", (16, 32, 1), {}),
    ("sit_xl2", "sit", "XL", (32, 4, 2), dict(inter_depth=(), sigma_channels="unused", clock="noise_at_0")),
    ("dit_xl2", "dit", "XL", (32, 4, 2), dict(inter_depth=())),
])
def test_full_size_checkpoints_are_recognised_by_names_and_shapes(name, family, size, latent, extra):
    shapes = full_size.shapes(name)
    config = recognised(shapes, family=family if "ig_" not in name else "")
    input_size, channels, patch = latent
    wanted = zoo.settings(family, size) | dict(
        input_size=input_size, channels=channels, patch_size=patch, num_classes=1000, **ARITHMETIC) | extra
    assert config == dit.DiTConfig(**wanted)
    assert published.published_shapes(config) == shapes
    traced = {name: leaf.shape for name, leaf in dit.shapes(config).items()}  # of the network itself
    assert traced == published.parameter_shapes(config)
    buffers = sum(math.prod(shapes[name]) for name in published.ROPE_BUFFERS if name in shapes)
    assert sum(math.prod(shape) for shape in shapes.values()) - buffers == full_size.KEYS[name]["total_params"]


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_every_option_of_the_published_networks_agrees_to_rounding(name):
    settings, golden = variants.VARIANTS[name], np.load(GOLDEN / "variants.npz")
    shapes = {key: tuple(shape) for key, shape in SMALL[name].items()}
    said = Claims(family=settings["code"], inter_depth=settings.get("head", 0))
    config = recognised(shapes, said, num_heads=4)
    state = {key: lambda key=key, shape=shape: variants.weight(key, shape) for key, shape in shapes.items()}
    params = {key: jnp.asarray(array) for key, array in published.read_params(state, config)}
    x, t, y = variants.inputs(name)
    reversed_clock = settings["code"] != "dit" and config.clock == "noise_at_0"
    ours = jnp.asarray(1 - t if reversed_clock else t)
    out = dit.apply(config, params, jnp.moveaxis(x, 1, -1), ours, jnp.asarray(y))
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
    with pytest.raises(UserError, match="another rotary embedding"):
        published.check_rope_buffers(tables | {sin: -tables[sin]}, config)


@pytest.mark.parametrize("metadata, found", [
    ({"args": {"model": "SiT-XL/2", "path_type": "linear", "prediction": "v", "num_classes": 1000}, "steps": 4_000},
     Claims("sit", num_classes=1000, path="linear", clock="noise_at_1", prediction="velocity", step=4_000)),
    ({"args": {"model": "SiT-B/4", "path_type": "GVP", "prediction": "noise", "encoder_depth": 4}},
     Claims("sit", inter_depth=4, path="cosine", clock="noise_at_0", prediction="noise")),
    ({"args": {"model": "DiT-L/2"}}, Claims("dit")),
    ({"config": {"model": {"model_type": "LightningDiT-XL/1", "encoder_depth": 6, "use_rope": True},
                 "transport": {"path_type": "Linear", "prediction": "velocity"},
                 "data": {"num_classes": 100, "latent_multiplier": 0.5}}},
     Claims("lightningdit", inter_depth=6, num_classes=100, rope=True, path="linear", clock="noise_at_0",
            prediction="velocity", latent_multiplier=0.5)),
    ({"args": {"model": ["SiT"], "encoder_depth": "8", "path_type": {}, "num_heads": True}, "config": 3,
      "steps": -1}, Claims()),
    ({"args": {"model": "UViT-H/2", "encoder_depth": 2**70, "path_type": "edm"}}, Claims()),
    ({}, Claims()),
])
def test_metadata_is_believed_only_where_it_has_the_published_form(metadata, found):
    assert claims.read(metadata) == found


XL = full_size.shapes("ig_sit_xl2")
ORIGINAL = full_size.shapes("sit_xl2")


def test_tensors_then_user_then_file_then_release_decide():
    assert recognised(XL).inter_depth == (8,)
    assert recognised(XL, Claims(inter_depth=6)).inter_depth == (6,)
    assert recognised(XL, Claims(inter_depth=6), inter_depth=4).inter_depth == (4,)
    assert recognised(XL, num_heads=8).num_heads == 8
    assert recognised(ORIGINAL, Claims(family="dit")).sigma_channels == "variance"
    assert recognised(ORIGINAL, Claims(path="cosine", clock="noise_at_0")).sigma_channels == "unused"
    assert recognised(XL, Claims(clock="noise_at_0")).clock == "noise_at_0"
    small = {key: tuple(shape) for key, shape in SMALL["sit_qk"].items()}
    assert recognised(small).num_heads == 4  # from the norm of one head
    wide = {key: tuple(shape) for key, shape in SMALL["ldit_no_rope"].items()}
    assert not recognised(wide).rope and recognised(wide, Claims(rope=True)).rope


@pytest.mark.parametrize("shapes, choices, words", [
    ({}, {}, "pos_embed is missing: not a SiT, DiT or LightningDiT"),
    (ORIGINAL, {}, "both an original SiT and a DiT"),
    (XL, dict(family="lightningdit"), "no RoPE, RMSNorm or SwiGLU"),
    (XL, dict(family="uvit"), "must be one of sit, dit, lightningdit"),
    (XL, dict(family="dit", claims=Claims(family="sit")), "the file says that it is a sit"),
    (XL, dict(family="dit"), "no rows for a learned sigma"),
    (full_size.shapes("ig_lightningdit_xl1"), dict(family="sit"), "the tensors are a LightningDiT's"),
    (full_size.shapes("ig_lightningdit_xl1"), dict(num_heads=12), "it fits --num_heads=16"),
    (ORIGINAL, dict(family="sit", inter_depth=8), "the file has no intermediate head"),
    (XL, dict(inter_depth=29), "inter_depth=29 must be in 1..28"),
    (XL | {"pos_embed": (1, 250, 1152)}, {}, "no square image"),
    (XL | {"pos_embed": (256, 1152)}, {}, "expected 3 dimensions"),
    (XL | {"x_embedder.proj.weight": (0, 4, 2, 2)}, {}, "none of them 0"),
    (XL | {"x_embedder.proj.weight": (1000, 4, 2, 2)}, {}, "give --num_heads"),
    (XL, dict(claims=Claims(num_classes=1001)), "no null label"),
    (XL | {"projectors.0.0.weight": (2048, 1152)}, {}, "projectors.0.0.weight [2048, 1152] belongs to no known"),
    (XL | {"blocks.7.attn.proj.weight": (1152, 1)}, {}, "attn.proj.weight is [1152, 1], expected [1152, 1152]"),
    ({k: v for k, v in XL.items() if k != "blocks.27.mlp.fc2.bias"}, {}, "blocks.27.mlp.fc2.bias [1152] is miss"),
    ({k: v for k, v in XL.items() if not k.startswith("blocks.3.")}, {}, "blocks.3.* are missing"),
    (XL | {f"blocks.{10**900}.attn.proj.weight": (1, 1)}, {}, "blocks.28.* are missing"),
    ({k: v for k, v in XL.items() if k != "blocks.0.mlp.fc2.weight"}, {}, "blocks.0.mlp.fc2.weight is miss"),
    (XL | {"blocks.\u00b2.attn": (1,)}, {}, "belongs to no known part"),
    (XL | {f"blocks.{i}.a": (1,) for i in range(40_000)}, {}, "has 40000 blocks"),
])
def test_what_does_not_fit_is_named(shapes, choices, words):
    choices = dict(choices)
    said = choices.pop("claims", Claims())
    with pytest.raises(UserError) as error:
        recognised(shapes, said, **choices)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_only_one_intermediate_head_has_a_published_form():
    config = dataclasses.replace(recognised(XL), inter_depth=(4, 8))
    with pytest.raises(UserError, match="at most one intermediate head"):
        published.published_shapes(config)
