"""`ig_jax.encode --from`: published folders of latents become shards of ours, bit for bit."""

import dataclasses
import sys

import numpy as np
import pytest
import toy
from latent_folders import LATENTS, every, opened
from refusal import refused

from ig_jax import encode
from ig_jax.base import cli
from ig_jax.data import shards
from ig_jax.encoding import copying
from ig_jax.models.latents import SD_VAE_SCALING, identity


def run(out, **given) -> shards.Card:
    values = dict(out=out, shard_size=5) | given
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["encode", *(f"--{name}={value}" for name, value in values.items())])
        cli.parse(toy.fresh(encode.FLAGS))
        encode.main()
    return shards.read_card(out)


@pytest.mark.parametrize(
    ("folder", "form", "side", "channels"),
    [
        ("repa", "repa", 32, 4),
        ("edm2/img64-sd.zip", "edm2", 32, 4),
        ("meanflow", "mf", 16, 4),
        ("lightningdit", "ldit", 16, 8),
    ],
)
def test_a_copy_reads_as_the_folder_it_is_of(tmp_path, folder, form, side, channels):
    out = tmp_path / "latents"
    card = run(out, **{"from": LATENTS / folder, "source": form})
    scaling = SD_VAE_SCALING if channels == 4 else identity(f"va_vae_f16d{channels}", channels, "half")
    theirs = opened(LATENTS / folder, form, side=side, channels=channels, scaling=scaling, classes=3)
    ours = opened(out, "shards", side=side, channels=channels, scaling=scaling, classes=3)
    assert len(ours) == len(theirs) == card.count == 12 and card.shard_lengths == (5, 5, 2)
    assert (ours.spec.holds, ours.spec.mirrored, ours.spec.scaling) == (
        *(theirs.spec.holds, theirs.spec.mirrored, theirs.spec.scaling),
    )
    expected, found = every(theirs), every(ours)
    for name, values in expected.items():
        values = np.moveaxis(values, 1, -1) if name != "label" else values
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name], values)
    assert card.input_range == ((0.0, 1.0) if form == "edm2" else (-1.0, 1.0))


def test_a_log_variance_stays_one_and_the_card_says_so(tmp_path, monkeypatch):
    open_latents, as_std = copying.open_latents, run(tmp_path / "std", **{"from": LATENTS / "meanflow"})

    def with_log_variance(*asked):
        source = open_latents(*asked)
        spec = dataclasses.replace(source.spec, spread="logvar")
        return dataclasses.replace(source, spec=spec, read=lambda rows: source.read(rows) | logarithms(source, rows))

    def logarithms(source, rows):
        mean, std = np.split(source.read(rows)["moments"], 2, axis=1)  # channels first
        return {"moments": np.concatenate([mean, 2 * np.log(std)], 1)}

    monkeypatch.setattr(copying, "open_latents", with_log_variance)
    card = run(tmp_path / "logvar", **{"from": LATENTS / "meanflow"})
    assert (as_std.spread, card.spread) == ("std", "logvar")
    np.testing.assert_allclose(card.channel_std, as_std.channel_std, rtol=1e-6)
    asked = dict(side=16, channels=4, scaling=SD_VAE_SCALING, classes=3)
    std, kept = (opened(tmp_path / name, "shards", **asked) for name in ("std", "logvar"))
    assert kept.spec.spread == "logvar"
    mean, spread = np.split(every(std)["moments"], 2, axis=-1)
    np.testing.assert_array_equal(every(kept)["moments"], np.concatenate([mean, 2 * np.log(spread)], -1))


def test_a_shard_that_is_missing_is_written_again(tmp_path, capsys):
    folder = {"from": LATENTS / "lightningdit"}
    run(tmp_path / "whole", **folder)
    run(tmp_path / "again", **folder)
    (tmp_path / "again" / "latents-train.array_record-00001-of-00003").unlink()
    run(tmp_path / "again", **folder)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    capsys.readouterr()
    run(tmp_path / "again", **folder)
    assert "nothing to do" in capsys.readouterr().out
    with refused("--out", str(tmp_path / "again"), says="another from"):
        run(tmp_path / "again", **{"from": LATENTS / "meanflow"})


def test_what_cannot_be_copied_is_refused(tmp_path):
    out = tmp_path / "latents"
    with refused("--source", "auto", expected="repa", fix="--source"):
        run(out, **{"from": LATENTS / "repa"})
    with refused("--from", str(tmp_path), expected="known form"):
        run(out, **{"from": tmp_path})
    with refused("--from", fix="decides"):
        run(out, size=64, **{"from": LATENTS / "repa"})
    damaged = LATENTS / "damaged" / "repa_nan"
    with pytest.raises(ValueError, match="not finite"):
        run(out, source="repa", **{"from": damaged})
    assert not (out / "card.json").exists()
