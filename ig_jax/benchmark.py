"""Measure the train step, the sampler and the kernels of a network, and the reading of data, on this machine.

  python -m ig_jax.benchmark train   --model=SiT-S/2 --batch=8,16 --dtype=float32,bfloat16
  python -m ig_jax.benchmark sample  --model=SiT-XL/2 --batch=64 --steps=25
  python -m ig_jax.benchmark train   --model=SiT-B/2 --peer=../before
  python -m ig_jax.benchmark train   --model=SiT-B/2 --peer="python launch/peer_diffusers.py"
  python -m ig_jax.benchmark kernels --model=SiT-B/2,SiT-XL/2 --batch=64
  python -m ig_jax.benchmark data    --folder=LATENTS, or without it a synthetic folder in each format
  python -m ig_jax.benchmark encode  --folder=IMAGES --batch=8 --dtype=float32,bfloat16, or without it soft noise

Several values of a flag make several cases; those that do the same work are timed in turns, and so are peers. The
command prints one table and appends a JSON line for each case to --results.
"""

from typing import Any

from absl import flags

from ig_jax.base import cli
from ig_jax.base.errors import check
from ig_jax.base.files import local_path
from ig_jax.base.schema import Text

WORDS = ("train", "sample", "kernels", "data", "encode")
AXES = {  # flag: (setting, help)
    "batch": ("data.batch_size", "Global batch, images; 8 for a published name."),
    "dtype": ("model.dtype", "Of matrix products: float32 or bfloat16; bfloat16 for a published name."),
    "scan": ("model.scan_blocks", "Blocks in one compiled loop: True or False."),
    "remat": ("model.remat", "What the backward pass recomputes: none, dots, full or auto."),
    "attention": ("model.attention", "Attention kernel: auto, xla or cudnn."),
    "depth": ("model.depth", "Number of blocks."),
    "width": ("model.width", "Width, with the same head dimension."),
    "latent": ("model.input_size", "Height and width of the latents; tokens = (latent / patch)^2."),
    "devices": ("devices", "How many devices to use; all by default."),
    "fsdp": ("mesh.fsdp", "Devices that share one copy of the state."),
    "steps": ("sample.steps", "Solver steps."),
    "solver": ("sample.solver", "Solver of the sampler."),
    "ig_scale": ("sample.ig_scale", "Scale of internal guidance; 1 is off."),
    "cfg_scale": ("sample.cfg_scale", "Scale of classifier-free guidance; 1 is off."),
}
FLAGS = flags.FlagValues()
_at: dict[str, Any] = {"flag_values": FLAGS}
MODEL = flags.DEFINE_list("model", [], "Published networks with their settings, such as SiT-S/2,SiT-XL/2.", **_at)
CONFIG_FILE = flags.DEFINE_string("config", "", "A config file instead, configs/NAME.py[:argument].", **_at)
LISTS = {name: flags.DEFINE_list(name, [], text, **_at) for name, (_, text) in AXES.items()}
REPEATS = flags.DEFINE_integer("repeats", 5, "Measured turns.", lower_bound=1, **_at)
WARMUP = flags.DEFINE_integer("warmup", 2, "Calls before the first turn.", lower_bound=1, **_at)
RESULTS = flags.DEFINE_string("results", "runs/benchmarks.jsonl", "File to which JSON lines are appended.", **_at)
PEER = flags.DEFINE_multi_string("peer", [], "Another checkout, or a command, to be timed in turns.", **_at)
FOLDER = flags.DEFINE_string(
    "folder", "", "For data: latents in any form that ig_jax.train reads; for encode: images.", **_at
)
PROFILE = flags.DEFINE_string("profile", "", "Directory for a trace of each case, for TensorBoard.", **_at)


def main(command: str) -> None:
    results = local_path(RESULTS.value, "--results")
    of_data = ("model", "config", "peer", "profile", *AXES)
    of_encode = (name for name in of_data if name not in ("batch", "dtype"))
    for name in {"data": of_data, "encode": of_encode}.get(command, ("folder",)):
        check(not FLAGS[name].present, f"--{name}", FLAGS[name].value, f"left out for {command}")
    if command == "data":
        from ig_jax.benchmarking import data  # late, as below

        return data.run(FOLDER.value, results)
    if command == "encode":
        from ig_jax.benchmarking import encoding

        batch, dtypes = LISTS["batch"].value or ["8"], LISTS["dtype"].value or ["float32", "bfloat16"]
        whole = len(batch) == 1 and batch[0].isdigit() and int(batch[0]) > 0
        check(whole, "--batch", ",".join(batch), "one number of images")
        check(set(dtypes) <= {"float32", "bfloat16"}, "--dtype", ",".join(dtypes), "float32 or bfloat16")
        return encoding.run(FOLDER.value, int(batch[0]), dtypes, REPEATS.value, results)
    models, config = MODEL.value, CONFIG_FILE.value
    one = bool(models) != bool(config)
    check(one, "--model and --config", (",".join(models), config), "one of the two", "try --model=SiT-S/2")
    axes = {
        AXES[name][0]: [int(v) if v.isdigit() else Text(v) for v in flag.value]
        for name, flag in LISTS.items()
        if flag.value
    }
    for name, (key, _) in AXES.items():
        only = command == "sample" or not key.startswith("sample.") or key not in axes
        check(only, f"--{name}", ",".join(LISTS[name].value), f"left out for {command}", "it belongs to sample")
    check(command != "kernels" or not PEER.value, "--peer", PEER.value, "left out for kernels")
    from ig_jax.benchmarking import cases, run  # late: they bring JAX, and wrong flags should fail at once

    bases = [cases.of_config(config)] if config else [cases.published(name) for name in models]
    made = [case for base in bases for case in cases.expanded(base, axes)]
    repeats, warmup = (1, 1) if command == "kernels" else (REPEATS.value, WARMUP.value)  # kernels time themselves
    profile = str(local_path(PROFILE.value, "--profile")) if PROFILE.value else ""
    run.run(command, made, results, repeats, warmup, profile, PEER.value)


if __name__ == "__main__":
    cli.run(main, FLAGS, __doc__, words=WORDS)
