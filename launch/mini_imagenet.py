"""The parts of mini_imagenet.sh: photographs in the forms of ImageNet, an autoencoder, and comparisons.

python launch/mini_imagenet.py make WORK               class folders, raw tars, parquet, and an autoencoder
python launch/mini_imagenet.py repa SHARDS OUT         the moments of a folder of shards in REPA's form
python launch/mini_imagenet.py compare WORK NAME...    latents and first ten losses of WORK/NAME are those of the first
"""

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "retina", "china", "flower")
OF_CLASS = 24  # cuts of each photograph


def make(work: Path) -> None:
    """Cuts of photographs, each photograph one class, in all forms; sizes and shapes vary."""
    images = photographs()
    random = np.random.default_rng(0)
    files: dict[str, bytes] = {}
    for number, photograph in enumerate(images):
        synset = f"n{number + 1:08d}"
        for cut in range(OF_CLASS):
            height, width = (int(random.integers(80, min(side, 300))) for side in photograph.shape[:2])
            top, left = (int(random.integers(0, a - b + 1)) for a, b in zip(photograph.shape, (height, width)))
            encoded = io.BytesIO()
            Image.fromarray(photograph[top : top + height, left : left + width]).save(encoded, "JPEG", quality=90)
            files[f"{synset}/{synset}_{cut}.JPEG"] = encoded.getvalue()
    for name, data in files.items():
        path = work / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    write_tars(work / "tars" / "ILSVRC2012_img_train.tar", files)
    write_parquet(work / "parquet" / "train-00000-of-00001.parquet", files)
    write_autoencoder(work / "autoencoder_by_hand")
    print(f"{len(files)} images in {len(images)} classes below {work}")


def photographs() -> list[np.ndarray]:
    """The photographs that scikit-image and scikit-learn ship, uint8 (H, W, 3)."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    samples = load_sample_images()
    found = {Path(name).stem: image for name, image in zip(samples.filenames, samples.images)}
    return [found[name] if name in found else getattr(data, name)()[..., :3] for name in PHOTOGRAPHS]


def write_tars(path: Path, files: dict[str, bytes]) -> None:
    """A tar of one tar for each synset, as ImageNet's."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))

    with tarfile.open(path, "w") as outer:
        for synset in sorted({name.split("/")[0] for name in files}):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for name, data in files.items():
                    if name.startswith(synset):
                        add(archive, name.split("/")[1], data)
            add(outer, f"{synset}.tar", inner.getvalue())


def write_parquet(path: Path, files: dict[str, bytes]) -> None:
    """Images and labels as Hugging Face stores them, in the order of the class folders."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    synsets = sorted({name.split("/")[0] for name in files})
    names = sorted(files)
    images = [{"bytes": files[name], "path": name.split("/")[1]} for name in names]
    labels = [synsets.index(name.split("/")[0]) for name in names]
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "label": labels}), path, row_group_size=50)


def write_autoencoder(directory: Path) -> None:
    """An autoencoder of factor 4 whose weights are chosen, not trained: colours and lightness of blocks of 4x4 pixels.

    Its norms would divide by the contrast of an image, and its activation silu is not linear; channels in pairs +x, -x
    undo the second, since silu(x) - silu(-x) = x.
    """
    from ig_jax.checkpoints import autoencoder as autoencoder_checkpoint
    from ig_jax.models import autoencoder

    config = autoencoder.AutoencoderConfig(channels=(16, 16, 16), layers=1, latent_channels=4, groups=8)
    params = {
        name: (np.ones if name.endswith("scale") else np.zeros)(leaf.shape, np.float32)
        for name, leaf in autoencoder.shapes(config).items()
    }
    colours = np.concatenate([np.eye(3), np.full((3, 1), 1 / 3)], axis=1)  # (3, 4): red, green, blue, lightness
    pairs = np.kron(np.eye(4, 8), [1, -1])  # (4, 16)
    gain, contrast = 5.0, 0.55  # of a latent before its scaling of 0.18215; of a usual image
    params["encoder.conv_in.kernel"][1, 1] = colours @ pairs
    params["encoder.conv_out.kernel"][1, 1, :, :4] = gain * pairs.T
    params["encoder.conv_out.bias"][4:] = -4.0  # the logarithm of the variance
    params["quant_conv.kernel"][0, 0], params["post_quant_conv.kernel"][0, 0] = np.eye(8), np.eye(4)
    params["decoder.conv_in.kernel"][1, 1] = pairs / gain
    params["decoder.conv_out.kernel"][1, 1] = contrast * pairs.T[:, :3]
    for name, kernel in params.items():
        if "downsample.kernel" in name:
            kernel[:2, :2] = np.eye(16) / 4
        if "upsample.kernel" in name:
            kernel[1, 1] = np.eye(16)
    autoencoder_checkpoint.save(directory, config, params, "diffusers")
    directory.with_name("published").mkdir(exist_ok=True)
    directory.with_name("published").joinpath("config.json").write_text(json.dumps({"norm_num_groups": config.groups}))


def records(folder: Path):
    """(arrays, label) of all records of a folder of shards."""
    from ig_jax.data import shards

    card = shards.read_card(folder)
    return [card.layout.decode(record) for file in card.shards for record in shards.read_shard(folder / file)]


def repa(folder: Path, out: Path) -> None:
    """The moments of a folder of shards as REPA's preprocessing writes them."""
    labels = []
    for number, (arrays, label) in enumerate(records(folder)):
        name = f"{number // 1000:05d}/img-mean-std-{number:08d}.npy"
        (out / "vae-sd" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(out / "vae-sd" / name, arrays["moments"].astype(np.float32).transpose(2, 0, 1))
        labels.append([name, label])
    (out / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels}))


def compare(work: Path, *names: str) -> None:
    """Exit with 1 unless latents and losses are those of the first name."""

    def found(name: str) -> tuple[list, list[float]]:
        metrics = [json.loads(line) for line in (work / "train" / name / "metrics.jsonl").read_text().splitlines()]
        folder = work / "latents" / name
        moments = [(a["moments"].tobytes(), label) for a, label in records(folder)] if folder.exists() else []
        return moments, [entry["loss/total"] for entry in metrics if "loss/total" in entry][:10]

    moments, losses = found(names[0])
    print(f"{names[0]}: losses {' '.join(f'{loss:.4f}' for loss in losses)}")
    for name in names[1:]:
        others, other_losses = found(name)
        same = (not others or others == moments) and other_losses == losses and len(losses) == 10
        print(f"{name}: {'the same latents and losses' if same else f'OTHER latents or losses: {other_losses}'}")
        if not same:
            sys.exit(1)


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "compare":
        compare(Path(arguments[0]), *arguments[1:])
    else:
        {"make": make, "repa": repa}[command](*map(Path, arguments))
