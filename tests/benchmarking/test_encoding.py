"""`benchmark encode`: decoding against a bare loop, and the encoder in each dtype."""

import json

import numpy as np
import toy
from PIL import Image
from refusal import refused

from ig_jax import benchmark
from ig_jax.benchmarking import encoding
from ig_jax.models import autoencoder
from ig_jax.models.autoencoder import AutoencoderConfig

PHOTOGRAPHS = toy.ROOT / "tests" / "golden" / "photographs" / "train"


def test_decoding_and_each_dtype_are_a_line_with_its_rate(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(autoencoder, "SD_VAE", AutoencoderConfig(channels=(32, 32), layers=1, latent_channels=4))
    monkeypatch.setattr(encoding, "SIZE", 16)
    results = tmp_path / "lines.jsonl"
    encoding.run(str(PHOTOGRAPHS), 8, ["float32", "bfloat16"], 1, results)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["part"] for line in lines] == ["decode", "encoder float32", "encoder bfloat16"]
    assert all(line["images_per_second"] > 0 for line in lines) and "cpu_ratio" in lines[0]
    assert capsys.readouterr().out.count("images/s") == 3


def test_both_loops_decode_the_same_images():
    images = encoding.encoded_images("")
    assert len(images) == encoding.COUNT and len(set(images)) == encoding.COUNT
    _, ours, _ = encoding.decoding(images[:3])
    pixels, broken = ours()
    assert pixels.shape == (3, 256, 256, 3) and not broken
    sizes = {Image.open(encoding.io.BytesIO(data)).size for data in images}
    assert sizes == {encoding.TYPICAL} and np.ptp(pixels) > 100


def test_flags_of_other_measurements_are_refused(monkeypatch):
    for flag, name in (("--model=SiT-S/2", "--model"), ("--batch=2,4", "--batch")):
        values = toy.fresh(benchmark.FLAGS)
        monkeypatch.setattr(benchmark, "FLAGS", values)
        values(["benchmark", flag])
        with refused(name):
            benchmark.main("encode")
