"""`benchmark data`: a row for each format, and for a folder of the user's."""

import json

import numpy as np
from latent_folders import LATENTS

from ig_jax.benchmarking import data
from ig_jax.encoding.copying import open_latents


def test_every_format_of_latents_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "COUNT", 48)
    monkeypatch.setattr(data, "BATCH", 16)
    data.run("", tmp_path / "results.jsonl", seconds=0.05)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == ["shards"] * 4 + ["repa", "edm2", "ldit-sd", "mf"]
    assert [row["bytes_each"] for row in rows] == [32768, 16384, 65536, *[32768] * 5]
    assert all(row["read"] > 0 and row["fed"] > 0 for row in rows)
    head, *table = capsys.readouterr().out.splitlines()
    assert "images/s" in head and len(table) == 8 and all("float" in line for line in table)


def test_the_synthetic_folders_hold_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "COUNT", 5)
    found = {name: open_latents(str(path), name, "train") for name, path in data.synthetic(tmp_path)}
    want = found["repa"].read(np.arange(5))
    for name in ("edm2", "mf"):
        batch = found[name].read(np.arange(5))
        assert all((batch[key] == want[key]).all() for key in want)
    ours = found["shards"].read(np.arange(5))
    assert (np.moveaxis(ours["moments"], -1, 1) == want["moments"]).all() and (ours["label"] == want["label"]).all()
    assert (found["ldit-sd"].read(np.arange(5))["latent"] == want["moments"][:, :4]).all()


def test_a_folder_of_the_user_s_needs_no_config(tmp_path, capsys):
    data.run(str(LATENTS / "lightningdit"), tmp_path / "results.jsonl", seconds=0.05)
    (row,) = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert row["bytes_each"] == 2 * 8 * 16 * 16 * 4 and row["dtype"] == "float32"
