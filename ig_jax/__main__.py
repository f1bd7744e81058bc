"""The commands of ig_jax: `python -m ig_jax` lists them, `python -m ig_jax train ...` and `ig-train ...` run one."""

import functools
import runpy
import sys
from collections.abc import Callable

COMMANDS = {
    "encode": "images to latents",
    "train": "a config to a run; the same command again resumes",
    "sample": "a checkpoint to images",
    "visualize": "pictures of what guidance changes",
    "evaluate": "FID and its relatives, of samples or of a checkpoint",
    "convert": "published weights to checkpoints, and back",
    "preflight": "memory, time and communication on machines that are not here",
    "benchmark": "speed on this machine",
}


def run(name: str) -> None:
    """The command `name`, with the arguments of this process."""
    runpy.run_module(f"ig_jax.{name}", run_name="__main__", alter_sys=True)


def __getattr__(name: str) -> Callable[[], None]:
    """The entry point of a console script."""
    if name not in COMMANDS:
        raise AttributeError(name)
    return functools.partial(run, name)


def main() -> None:
    """The list of commands, or the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in COMMANDS:
        del sys.argv[1]
        return run(name)
    print("usage: python -m ig_jax COMMAND [--help]\n")
    for command, text in COMMANDS.items():
        print(f"  {command:<11}{text}")
    if name not in ("", "-h", "--help"):
        print(f"ig_jax: error: command={name!r} must be one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
