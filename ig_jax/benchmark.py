"""Measure the train step and the sampler on this machine: speed, utilisation, memory, compile time.

  python -m ig_jax.benchmark train   --model=SiT-S/2 --batch=8,16 --dtype=float32,bfloat16
  python -m ig_jax.benchmark sample  --model=SiT-XL/2 --batch=64 --dtype=bfloat16 --steps=25
  python -m ig_jax.benchmark train   --model=SiT-B/2 --peer=diffusers --peer_compile
  python -m ig_jax.benchmark data    --config=configs/digits.py
  python -m ig_jax.benchmark compile --model=SiT-S/2
  python -m ig_jax.benchmark memory  --model=SiT-B/2 --batch=8,16,32
  python -m ig_jax.benchmark kernels --model=SiT-B/2,SiT-XL/2 --batch=64 --dtype=bfloat16

Several values make several cases; those that do the same work take turns. One table on screen, one JSON line
for each case in --results.
"""

from pathlib import Path

from absl import flags

from ig_jax import cli
from ig_jax.errors import UserError, check

WORDS = ("train", "sample", "data", "compile", "memory", "kernels")
FLAGS = flags.FlagValues()
_define = {"flag_values": FLAGS}
MODEL = flags.DEFINE_list("model", [], "Networks by their names, such as SiT-S/2,SiT-XL/2.", **_define)
CONFIG_FILE = flags.DEFINE_string("config", "", "Or a config file, configs/NAME.py[:argument], with its data.",
                                 **_define)
LISTS = {  # axis: (how a value is read, help)
    "batch": (int, "Global batch, images."),
    "dtype": (str, "Of the matrix products: float32, bfloat16."),
    "scan": (None, "Blocks in one compiled loop: on, off."),
    "remat": (str, "What the backward pass recomputes: none, dots, full, auto."),
    "attention": (str, "Which attention kernel: auto, xla, cudnn."),
    "depth": (int, "Blocks, instead of the network's own."),
    "width": (int, "Width, of the same head dimension, instead of the network's own."),
    "latent": (int, "Latent height = width, so tokens = (latent / patch)^2."),
    "devices": (int, "How many devices to use; all where not given."),
    "cfg_scale": (float, "Scale of classifier-free guidance when sampling; 1 is off."),
}
AXES = {name: flags.DEFINE_list(name, [], f"{help_} Several make several cases.", **_define)
        for name, (_, help_) in LISTS.items()}
MESH = flags.DEFINE_list("mesh", [], "Devices along data, fsdp, tensor; one may be -1.", **_define)
STEPS = flags.DEFINE_integer("steps", None, "Solver steps, to shorten what is sampled.", **_define)
SOLVER = flags.DEFINE_string("solver", None, "Solver, instead of the recipe's own.", **_define)
IG_SCALE = flags.DEFINE_float("ig_scale", None, "Scale of internal guidance when sampling; 1 is off.", **_define)
REPEATS = flags.DEFINE_integer("repeats", 5, "Turns that are measured.", **_define)
WARMUP = flags.DEFINE_integer("warmup", 2, "Calls before them.", **_define)
WAIT = flags.DEFINE_float("wait", 2.0, "Seconds to wait for an idle machine, at most.", **_define)
RESULTS = flags.DEFINE_string("results", "runs/benchmarks.jsonl", "File to add the JSON lines to.", **_define)
PEER = flags.DEFINE_enum("peer", None, ["diffusers"], "The same work in PyTorch too, in turns.", **_define)
PEER_COMPILE = flags.DEFINE_bool("peer_compile", False, "The peer under torch.compile too.", **_define)
PROFILE = flags.DEFINE_string("profile", "", "Directory for a trace of each case, for TensorBoard.", **_define)
# Flags that not every command reads.
READERS = {
    "peer": ("train", "sample"), "profile": ("train", "sample"), "remat": ("train", "memory", "compile", "data"),
    **{name: ("sample",) for name in ("steps", "solver", "ig_scale", "cfg_scale")},
}


def main(command: str) -> None:
    axes = {name: [_read(name, text) for text in AXES[name].value] for name in LISTS}
    config = CONFIG_FILE.value
    check(bool(MODEL.value) != bool(config), "--model and --config", (",".join(MODEL.value), config),
          "one of the two", "try --model=SiT-S/2")
    check(command != "data" or config, "--config", config, "given for data, which a name alone has not")
    check(len(MESH.value) in (0, 3), "--mesh", ",".join(MESH.value), "three numbers such as -1,1,1")
    check(REPEATS.value >= 1, "--repeats", REPEATS.value, "at least 1")
    check(WARMUP.value >= 1, "--warmup", WARMUP.value, "at least 1, which compiles")
    check(not PEER_COMPILE.value or PEER.value, "--peer_compile", True, "given together with --peer=diffusers")
    for flag, readers in READERS.items():
        check(command in readers or not FLAGS[flag].value, f"--{flag}", FLAGS[flag].value,
              f"left out for {command}", f"it belongs to {', '.join(readers)}")
    from ig_jax.benchmarking import run  # late: brings JAX, and bad flags should fail at once

    singles = {"mesh": tuple(_number("mesh", text, int) for text in MESH.value) or None, "steps": STEPS.value,
               "solver": SOLVER.value, "ig_scale": IG_SCALE.value}
    run.run(run.Request(
        command, tuple(MODEL.value), config, axes | {name: [v] for name, v in singles.items() if v is not None},
        run.Plan(REPEATS.value, WARMUP.value, WAIT.value, PROFILE.value),
        (False, True)[: bool(PEER.value) + PEER_COMPILE.value], Path(RESULTS.value).expanduser(),
    ))


def _read(name: str, text: str):
    if name != "scan":
        return _number(name, text, LISTS[name][0])
    check(text in ("on", "off"), "--scan", text, "on or off")
    return text == "on"


def _number(name: str, text: str, kind: type):
    try:
        value = kind(text)
    except ValueError:
        raise UserError(f"--{name}={text!r} must be {'whole numbers' if kind is int else 'numbers'}") from None
    check(kind is not int or name == "mesh" or value >= 1, f"--{name}", value, "at least 1")
    return value


if __name__ == "__main__":
    cli.run(main, FLAGS, __doc__, words=WORDS)
