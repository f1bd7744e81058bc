"""Published settings: the network, training and sampling of every family and size of the papers.

configs/, converted checkpoints and benchmarks read them here. A new family is one entry of FAMILIES, in addition to its
network in models/zoo.py and its tensor names in interop/. Where the release of a paper differs from the paper both
are given.

Source: arXiv 2512.24176 (SiT, DiT and LightningDiT with an intermediate head) and its release,
CVL-UESTC/Internal-Guidance; without a head arXiv 2401.08740 (SiT), 2212.09748 (DiT) and 2501.01423
(LightningDiT, with hustvl/LightningDiT configs/lightningdit_xl_vavae_f16d32.yaml).
"""

import copy
import dataclasses
from typing import Any

from ig_jax.base.errors import UserError, check
from ig_jax.diffusion.presets import PRESETS
from ig_jax.models import zoo
from ig_jax.models.dit import DiTConfig
from ig_jax.models.latents import SD_VAE_SCALING, LatentScaling

Sections = dict[str, Any]  # {section: {key: value}} of an Experiment

# The rules of the papers, named so that a config file lists their keys also where a rule is off.
_OFF = dict(ig_scale=1.0, cfg_scale=1.0, ig_interval=(0.0, 1.0), cfg_interval=(0.0, 1.0))
_ADAMW = dict(
    name="adamw",
    learning_rate=1e-4,
    schedule="constant",
    warmup_steps=0,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    clip_norm=1.0,
    accumulate=-1,
    train_only=(),
)
_MUON = _ADAMW | dict(
    name="muon", learning_rate=2e-4, b2=0.95, weight_decay=0.01, muon_momentum=0.95, muon_routing="hidden"
)
_LOSS = dict(
    label_drop=0.1,
    accelerate=False,
    omega=1 / 3,
    gap_source="ema",
    start_step=0,
    direction_weight=0.0,
    direction_intermediate=False,
)
_DATA = dict(
    source="auto",
    name="",
    folder="",  # where the latents are, for the user to say
    split="train",
    test_split="validation",
    batch_size=256,
    pad=0,
    in_memory=False,
    holds="auto",
    dtype="auto",
    mirrored="auto",
)
# Sixteen divides every width of the published networks; their state is then below 1 GB on each device.
_MESH = dict(data=-1, fsdp=1, tensor=1, fsdp_up_to=16)
_RUN = dict(
    log_every=100, checkpoint_every=5_000, keep_checkpoints=2, preview_every=0, preview_images=0, autoencoder=""
)
_FLOW = dict(kind="linear", prediction="velocity", time="uniform", time_mean=0.0, time_std=1.0)
_SD_LATENTS = dataclasses.asdict(SD_VAE_SCALING)
# The mean and deviation of each channel come with the latents (Experiment.of_data).
_VA_LATENTS = dict(name="va_vae_f16d32", shift=(0.0,) * 32, scale=(1.0,) * 32, uint8_rule="half")


def _recipe(preset: str, **guidance: Any) -> dict[str, Any]:
    return PRESETS[preset].recipe | guidance


@dataclasses.dataclass(frozen=True)
class Family:
    """What the papers say of one family. Mappings by size hold "" for the sizes that they do not name."""

    patch: int  # latent pixels along the edge of a patch
    pixels: tuple[int, ...]  # image sizes, of which the papers train some
    factor: int  # pixels along the edge of one latent pixel
    latents: dict[str, Any]
    process: dict[str, Any]
    optimizer: dict[str, Any]
    decays: tuple[float, ...]  # of the averages
    steps: dict[str, int]
    sample: dict[str, dict[str, Any]]
    plain: Sections  # differences of the network without an intermediate head
    plain_steps: dict[int, int]  # by image size
    direction_weight: float = 0.0
    release: Sections | None = None  # differences of the released code from the paper, None without one
    release_steps: dict[str, int] = dataclasses.field(default_factory=dict)


# By the keys of zoo.FAMILIES.
FAMILIES: dict[str, Family] = {
    "sit": Family(
        patch=2,
        pixels=(256, 512),
        factor=8,
        latents=_SD_LATENTS,
        process=_FLOW,
        optimizer=_ADAMW,
        decays=(0.9999,),
        steps={"XL": 4_000_000, "": 400_000},
        # The paper gives no scale for S and L: they take that of B.
        sample={"XL": _recipe("sit-xl-ig-cfg"), "": _recipe("sit-b-ig")},
        plain={"sample": _recipe("sit", cfg_scale=1.5)},
        plain_steps={256: 7_000_000, 512: 3_000_000},
        release={"model": dict(inter_depth=(8,))},
        release_steps={"XL": 4_100_000},
    ),
    "dit": Family(
        patch=2,
        pixels=(256, 512),
        factor=8,
        latents=_SD_LATENTS,
        process=_FLOW | dict(kind="gaussian", prediction="noise"),
        optimizer=_ADAMW,
        decays=(0.9999,),
        steps={"": 400_000},
        # The paper gives no scale for DiT: 1.9 is the one it uses for SiT-B/2 without an interval.
        sample={"": _recipe("dit", ig_scale=1.9)},
        plain={"sample": _recipe("dit", cfg_scale=1.5)},
        plain_steps={256: 7_000_000, 512: 3_000_000},
    ),
    "lightningdit": Family(
        patch=1,
        pixels=(256,),
        factor=16,
        latents=_VA_LATENTS,
        process=_FLOW,
        optimizer=_MUON,
        decays=(0.9995, 0.9999),
        steps={"": 3_400_000},  # 680 epochs of 5,004 steps
        sample={"": _recipe("lightningdit-ig-cfg")},
        # The release guides three of 32 channels at scale 6.7; all are guided here, at the scale of the paper on IG.
        plain={
            "process": dict(time="logit_normal"),
            "sample": _recipe("lightningdit", cfg_scale=1.45, cfg_interval=(0.0, 0.81)),
            "optimizer": _ADAMW | dict(learning_rate=2e-4, b2=0.95),
            "ema": dict(decays=(0.9999,)),
            "data": dict(batch_size=1024),
        },
        plain_steps={256: 1_000_000},  # 800 epochs of 1,251 steps
        direction_weight=1.0,
        # The release samples from the average 0.9999, and gives every tensor of two or more dimensions to Muon.
        release={"optimizer": _MUON | dict(muon_routing="release"), "ema": dict(decays=(0.9999, 0.9995))},
        release_steps={"": 3_000_000},
    ),
}


def names() -> tuple[str, ...]:
    """Every published name, such as "SiT-XL/2"."""
    return tuple(
        f"{family.name}-{size}/{FAMILIES[key].patch}" for key, family in zoo.PUBLISHED.items() for size in family.sizes
    )


def settings(name: str, *, release: bool = False, pixels: int = 256, head: bool = True) -> Sections:
    """All sections of an Experiment by the name of its network, on ImageNet at `pixels` x `pixels`.

    release: as the released code does it where that differs from the paper; head: with an intermediate head, which the
    papers on DiT, SiT and LightningDiT themselves do not have.
    Raises: UserError for an unknown network or image size, or a family without a release.
    """
    model = zoo.named(name)
    word, size = name.split("/")[0].split("-")
    f = FAMILIES[zoo.NAMES[word]]
    check(pixels in f.pixels, "pixels", pixels, f"one of {', '.join(map(str, f.pixels))} for {word}")
    if release and (f.release is None or not head):
        raise UserError(name="release", value=release, expected=f"False for {name} {'with' if head else 'without'} IG")
    steps = f.steps | (f.release_steps if release else {})
    weights = (0.5,) * len(model["inter_depth"])
    shape = dict(input_size=pixels // f.factor, channels=len(f.latents["scale"]), num_classes=1000)
    found: Sections = {
        "name": f"{word}_{size}_imagenet{pixels}".lower(),
        "seed": 0,
        "init": dict(checkpoint="", ema=""),
        "model": model | shape | dict(dtype="bfloat16", scan_blocks=False, remat="auto"),
        "latents": f.latents,
        "process": f.process,
        "loss": _LOSS | dict(inter_weight=weights, direction_weight=f.direction_weight),
        "optimizer": f.optimizer,
        "ema": dict(decays=f.decays, warmup=False),
        "data": _DATA,
        "mesh": _MESH,
        "run": _RUN | dict(steps=steps.get(size, steps[""])),
        "sample": f.sample.get(size, f.sample[""]),
    }
    if not head:
        found = _changed(found, {"model": dict(inter_depth=()), "loss": dict(inter_weight=())})
        found = _changed(found, f.plain | {"run": dict(steps=f.plain_steps[pixels])})
    if release and f.release:
        found = _changed(found, f.release)
    found["sample"] = _OFF | found["sample"]
    return copy.deepcopy(found)


def _changed(base: Sections, changes: Sections) -> Sections:
    """The settings with other values; `sample` and `optimizer`, whose keys depend on a name, are replaced whole."""
    whole = ("sample", "optimizer")
    return base | {key: value if key in whole else base[key] | value for key, value in changes.items()}


def of_network(family: str, model: DiTConfig, latents: LatentScaling) -> Sections:
    """Settings of a network that was read from a published file, to sample it or train it on.

    They are those of the published size next to it in width, in the released form where there is one; the network,
    its latents and what follows from them are its own.
    """
    heads = len(model.inter_depth)
    word, sizes, _ = zoo.PUBLISHED[family]
    size = min(sizes, key=lambda size: abs(zoo.SIZES[size]["width"] - model.width))
    f = FAMILIES[family]
    pixels = min(f.pixels, key=lambda pixels: abs(pixels - model.input_size * f.factor))
    name = f"{word}-{size}/{f.patch}"
    found = settings(name, release=bool(heads and f.release), pixels=pixels, head=bool(heads))
    found["model"] = dataclasses.asdict(model)
    found["loss"] |= dict(inter_weight=(0.5,) * heads)
    if model.channels == 1:
        found["loss"] |= dict(direction_weight=0.0)  # one channel has no direction
    found["latents"] = dataclasses.asdict(latents)
    if latents.name == "pixels":
        found["data"] |= dict(holds="pixels", dtype="uint8", mirrored=False)
    return found
