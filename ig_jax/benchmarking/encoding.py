"""Images per second of what `encode` does: decoding and cropping against a bare Pillow loop, and the encoder of the SD
autoencoder against diffusers' in PyTorch, where that is installed; in turns."""

import importlib.util
import io
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from ig_jax.base.files import append_lines
from ig_jax.base.versions import versions
from ig_jax.benchmarking.programs import hardware
from ig_jax.checkpoints.autoencoder import Autoencoder
from ig_jax.data import crop
from ig_jax.data.images.decoding import decode_all
from ig_jax.data.images.opening import open_images
from ig_jax.encoding.encoder import make_encode
from ig_jax.models import autoencoder

SIZE = 256
COUNT = 64  # images to decode
TYPICAL = (500, 375)  # pixels of an image of ImageNet

Turn = tuple[float, float]  # seconds by the wall and of the processor


def run(folder: str, batch: int, dtypes: list[str], repeats: int, results: Path) -> None:
    """Print images/s and ratios of our time to the peer's, medians of `repeats` turns, and append JSON lines.

    Raises: UserError for a folder of images that cannot be opened.
    """
    images = encoded_images(folder)
    for name, ours, peer in (decoding(images), *(encoder(dtype, batch) for dtype in dtypes)):
        count = len(images) if name == "decode" else batch
        turns = [(timed(ours), timed(peer) if peer else None) for _ in range(repeats)]
        line = {"benchmark": "encode", "part": name, "images": count, "hardware": hardware(), "versions": versions()}
        wall = statistics.median(mine[0] for mine, _ in turns)
        text = f"{name:<18}{count / wall:>10,.2f} images/s"
        if peer:
            wall_ratio, cpu_ratio = (
                statistics.median(mine[clock] for mine, _ in turns)
                / statistics.median(theirs[clock] for _, theirs in turns if theirs)
                for clock in (0, 1)
            )
            line |= {"wall_ratio": wall_ratio, "cpu_ratio": cpu_ratio}
            text += f", time / peer's {wall_ratio:.2f}, CPU time {cpu_ratio:.2f}"
        print(text, flush=True)
        append_lines(results, [line | {"images_per_second": count / wall, "turns": turns}])


def encoded_images(folder: str) -> list[bytes]:
    """The files of COUNT images of a source that `encode` reads, or without one of soft noise, of ImageNet's size."""
    if folder:
        images = open_images(folder, "train")
        return images.read(images.some(min(COUNT, len(images))).places)
    random, found = np.random.default_rng(0), []
    for _ in range(COUNT):
        coarse = Image.fromarray(random.integers(0, 256, (47, 63, 3), np.uint8))
        file = io.BytesIO()
        coarse.resize(TYPICAL, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


Part = tuple[str, Callable[[], object], Callable[[], object] | None]


def decoding(images: list[bytes]) -> Part:
    """One worker's decoding of all images, and the loop that it cannot beat."""

    def bare() -> None:
        for data in images:
            np.asarray(crop.centre_crop(Image.open(io.BytesIO(data)).convert("RGB"), SIZE))

    return "decode", lambda: decode_all(lambda places: places, images, SIZE, 3), bare


def encoder(dtype: str, batch: int) -> Part:
    """The encoder of the SD autoencoder with random weights on all devices, and diffusers' on the same processors."""
    config, random = autoencoder.SD_VAE, np.random.default_rng(0)
    params = {
        name: np.asarray(random.normal(size=leaf.shape) * 0.02, np.float32)
        for name, leaf in autoencoder.shapes(config).items()
    }
    encode = make_encode(Autoencoder(config, jax.device_put(params), ""), "moments", dtype, False, dtype)
    pixels, rows = random.integers(0, 256, (batch, SIZE, SIZE, 3), np.uint8), np.arange(batch)
    ours = lambda: jax.block_until_ready(encode(pixels, rows))
    return f"encoder {dtype}", ours, torch_encoder(dtype, pixels) if importlib.util.find_spec("diffusers") else None


def torch_encoder(dtype: str, pixels: np.ndarray) -> Callable[[], object]:
    """diffusers' encoder of the same shape, in the memory format that is fastest for convolutions."""
    import torch  # late: an extra
    from diffusers import AutoencoderKL

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    levels = len(autoencoder.SD_VAE.channels)
    network: Any = AutoencoderKL
    model = network(
        block_out_channels=autoencoder.SD_VAE.channels,
        layers_per_block=autoencoder.SD_VAE.layers,
        latent_channels=autoencoder.SD_VAE.latent_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    )
    model = model.eval().to(getattr(torch, dtype), memory_format=torch.channels_last)

    def call() -> object:
        with torch.inference_mode():
            x = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(getattr(torch, dtype)) / 127.5 - 1
            found = model.encode(x).latent_dist
            return found.mean, found.std

    return call


def timed(work: Callable[[], object]) -> Turn:
    """Seconds of one call after another that is not counted."""
    work()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu
