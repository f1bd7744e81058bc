"""What the files in configs/ share: their flag, their argument, and the small form on the built-in digits."""

import copy
import re
import runpy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags

from ig_jax.base.errors import UserError, check, one_line
from ig_jax.base.files import is_dir, is_file
from ig_jax.base.schema import Text, bind
from ig_jax.config import shipped, stored
from ig_jax.config.experiment import Experiment

_OVERRIDE = re.compile(r"--?(no)?config\.([^=]+)(?:=(.*))?", re.DOTALL)


class ConfigFlags(flags.FlagValues):
    """Flags of a command with --config=FILE[:ARGUMENT], and --config.KEY=VALUE for every setting of an experiment.

    Values stay text until `experiment` reads each by the type of its setting, which a default in a file need not have:
    a scale is a number there, or a table.
    """

    def __init__(self, doc: str):
        super().__init__()
        flags.DEFINE_string("config", None, doc, flag_values=self)

    def __call__(self, argv: Iterable[str], known_only: bool = False) -> list[str]:
        """Parse all flags; the overrides among them are kept in order."""
        command, *given = argv
        rest, self.__dict__["overrides"] = _split(self.read_flags_from_files(given, force_gnu=False))
        return super().__call__([command, *rest], known_only)

    def load(self, run: str | None = None) -> dict[str, Any]:
        """The sections of the config, by default of the work directory `run`, overrides applied as text.

        Raises: UserError.
        """
        path = self["config"].value
        sections = sections_of(path) if path else stored.of_run(run) if run else None
        if sections is None:
            what = f"--config is missing, and --workdir={run!r} holds no run to go on with" if run else ""
            raise UserError(what or "--config is missing", name="--config", fix="see --help")
        return overridden(sections, self.__dict__["overrides"])

    def experiment(self, run: str | None = None) -> Experiment:
        """The experiment of `load`.  Raises: UserError that names the setting."""
        return bind(Experiment, self.load(run))


def overridden(sections: dict[str, Any], overrides: list[tuple[str, str]]) -> dict[str, Any]:
    """The sections with the texts of overrides, ("run.steps", "20"), in place of their values.

    Raises: UserError for a setting inside one that is no section.
    """
    sections = copy.deepcopy(sections)
    for key, text in overrides:
        *parents, last = key.split(".")
        section = sections
        for parent in parents:
            section = section.setdefault(parent, {})
            check(isinstance(section, dict), f"config.{key}", text, f"left out: {parent} is a value, not a section")
        section[last] = Text(text)
    return sections


def _split(arguments: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """(other arguments, overrides as (key, text)) of a command line."""
    rest, overrides, position = [], [], 0
    while position < len(arguments):
        found = _OVERRIDE.fullmatch(arguments[position])
        position += 1
        if not found:
            rest.append(arguments[position - 1])
            continue
        no, key, text = found.groups()
        if text is None and not no and position < len(arguments) and not arguments[position].startswith("--"):
            text, position = arguments[position], position + 1  # --config.KEY VALUE
        overrides.append((key, text if text is not None else "False" if no else "True"))
    return rest, overrides


def sections_of(path: str) -> dict[str, Any]:
    """The sections, as dicts, of a run, or that get_config of FILE[:ARGUMENT] returns.  Raises: UserError."""
    if (is_dir(path) or path.endswith(f"/{stored.FILE}")) and (sections := stored.of_run(path)) is not None:
        return sections
    ends = [found.start() for found in re.finditer(":", path)] + [len(path)]
    end = next((end for end in reversed(ends) if is_file(path[:end])), None)
    name = path.partition(":")[0]
    if end is None and name in shipped.names():
        end, file = len(name), shipped.folder() / f"{name}.py"
    else:
        fix = f"write a path, or one of {', '.join(shipped.names())}, then a colon and its argument"
        check(end is not None, "--config", path, "an existing config file, or a run", fix)
        file = Path(path[:end]).expanduser()
    argument = path[end:][1:]
    try:
        found = runpy.run_path(str(file))
        check("get_config" in found, "--config", path, "a file that defines get_config")
        config = found["get_config"](*[argument][: bool(path[end:])])
    except UserError:
        raise
    except Exception as error:  # a config file is arbitrary Python
        raise UserError(f"--config={path!r}: {one_line(error)}", name="--config", value=path) from error
    mapping = hasattr(config, "to_dict") or isinstance(config, dict)
    check(mapping, "--config", path, "a file whose get_config returns a config")
    return config.to_dict() if hasattr(config, "to_dict") else config


def words(argument: str, *groups: tuple[str, ...]) -> tuple[str, ...]:
    """One word of each group from an argument such as "XL,release"; the first of a group where none is given.

    Raises: ValueError for a word of no group, or two of one.
    """
    given = [word for word in argument.split(",") if word]
    chosen = tuple(next((word for word in given if word in group), group[0]) for group in groups)
    for word in given:
        if given.count(word) > 1 or word not in chosen:
            raise ValueError(
                f"config argument {argument!r} must have at most one word of each: "
                + "; ".join(" or ".join(group) for group in groups)
            )
    return chosen


def from_checkpoint(argument: str, *groups: tuple[str, ...]) -> tuple[ml_collections.ConfigDict, tuple[str, ...]]:
    """(all settings of a checkpoint, started from its weights; the words) of an argument "runs/plain,words".

    The longest beginning that is a directory is the checkpoint: its name may hold commas.

    Raises: ValueError for an argument without a checkpoint or with other words, UserError for a bad checkpoint.
    """
    ends = [found.start() for found in re.finditer(",", argument)] + [len(argument)]
    end = next((end for end in reversed(ends) if is_dir(argument[:end])), ends[0])
    checkpoint, options = argument[:end], argument[end + 1 :]
    if not checkpoint:
        raise ValueError("config argument must begin with a checkpoint, such as runs/plain")
    chosen = words(options, *groups, ("full", "runlocal"))
    config = ml_collections.ConfigDict(stored.of_checkpoint(checkpoint))
    config.init = dict(checkpoint=checkpoint, ema="")
    runlocal = chosen[-1] == "runlocal"
    config.run = dict(
        steps=200 if runlocal else 50_000,
        log_every=50,
        checkpoint_every=100 if runlocal else 2_000,
        keep_checkpoints=2,
        preview_every=0,
        preview_images=0,
    )
    return config, chosen


def on_digits(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The same family, loss, optimizer and solver, a small network and the built-in digits."""
    config.name = f"{config.name}_runlocal"
    config.model.update(
        input_size=8,
        channels=1,
        patch_size=2,
        depth=6,
        width=64,
        num_heads=2,
        num_classes=10,
        inter_depth=(2,) if config.model.inter_depth else (),
        dtype="float32",
    )
    config.latents = dict(name="pixels", shift=(0.0,), scale=(1.0,), uint8_rule="half")
    config.loss.update(direction_weight=0.0)  # one channel has no direction
    config.optimizer.update(learning_rate=2e-3, warmup_steps=100, accumulate=1)
    config.ema.update(decays=(0.999,), warmup=True)
    config.data = dict(
        source="tfds",
        name="ig_digits",
        folder="",
        split="train",
        test_split="test",
        batch_size=128,
        pad=0,
        in_memory=True,
        holds="pixels",
        dtype="uint8",
        mirrored=False,
    )
    config.mesh.update(data=-1, fsdp=1, tensor=1, fsdp_up_to=1)
    config.run.update(
        steps=200, log_every=50, checkpoint_every=100, keep_checkpoints=2, preview_every=100, preview_images=40
    )
    config.sample.update(steps=25)
    return config
