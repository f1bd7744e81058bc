"""Settings given on the command line: read by their types, or refused in one line, whatever is written."""

import dataclasses
import functools
import json
import typing

import pytest
import toy
from refusal import refused

from ig_jax.base.errors import UserError
from ig_jax.base.schema import bind
from ig_jax.config import files
from ig_jax.config.experiment import Experiment
from ig_jax.diffusion.guidance import RULES
from ig_jax.diffusion.recipe import solver_options
from ig_jax.diffusion.solvers import SOLVERS

ODD = [
    *("", " ", "abc", "None", "nan", "-inf", "-1", "0", "1", "7", "1e3", "1.5", "999999999999", "1e400", "1e39"),
    *("0x10", "1_000", "()", "(1,2,3)", "[1", "(0.5, 0.25)", "a,b", "{'a': 1}", "{1: 2}", "True", "cosine:1,2"),
    *("0:1,0.5:2,1:3", "é☃", "'quoted'", "x" * 5000, "(" * 300, "gs://bucket/x", "--help"),
]
CONFIGS = [
    *("digits", "digits:plain", "fashion_mnist", "sit_imagenet256:XL", "sit_imagenet256:B,release"),
    *("dit_imagenet256:B", "lightningdit_imagenet256:XL", "sit_imagenet256:XL,runlocal"),
]


@functools.cache
def sections(config: str) -> dict:
    name, _, argument = config.partition(":")
    return toy.load_config(name, argument).to_dict()


def made(config: str, *overrides: tuple[str, str]) -> Experiment:
    return bind(Experiment, files.overridden(sections(config), list(overrides)))


def settings(config: str) -> list[str]:
    """Every setting that the experiment of a config can have, as "section.key", and the sections themselves."""
    found, e = [], made(config)
    for field in dataclasses.fields(Experiment):
        value = getattr(e, field.name)
        found.append(field.name)
        if field.name == "sample":
            rules = [f"{name}_{part}" for name in RULES for part in ("scale", "interval")]
            keys = ["solver", "steps", *rules, "ig_head", "cfg_channels", *solver_options(e.sample.solver.name)]
        else:
            keys = [inner.name for inner in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
        found += [f"{field.name}.{key}" for key in keys]
    return found


def value_of(e: Experiment, key: str):
    section, _, name = key.rpartition(".")
    owner = getattr(e, section) if section else e
    return owner.flat().get(name) if section == "sample" else getattr(owner, name)


def as_meant(text: str, value) -> bool:
    """Whether a value is what a person who wrote `text` can have meant."""
    if isinstance(value, bool):
        return text.strip().lower() in (("true", "1") if value else ("false", "0"))
    if isinstance(value, str):
        return value == text.strip()
    if isinstance(value, int | float):
        return float(int(text, 16) if "x" in text else float(text)) == value
    if isinstance(value, tuple):
        words = [word.strip(" '\"") for word in text.strip(" ()[]").split(",") if word.strip()]
        return len(words) == len(value) and all(as_meant(word, part) for word, part in zip(words, value))
    return False


@pytest.mark.parametrize("config", CONFIGS)
def test_every_setting_takes_what_is_meant_or_refuses_it_in_one_line(config):
    for key in settings(config):
        for text in ODD:
            try:
                found = made(config, (key, text))
            except UserError as error:
                line = str(error)
                assert error.name and line and "\n" not in line and "None is not" not in line, (key, text)
                continue
            value = value_of(found, key)
            if value is not None:  # a rule that is off is left out of the flat form
                assert as_meant(text, value), (key, text, value)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_option_of_every_solver_refuses_what_it_is_not(solver):
    config = "dit_imagenet256:B" if SOLVERS[solver].chain else "digits"
    base = [("sample", str({"solver": solver, "steps": 10}))]
    made(config, *base)
    for option, kind in solver_options(solver).items():
        for text in ("abc", "(1,2,3)", "None", "{}", ""):
            if kind is str:
                continue
            with refused(f"config.sample.{option}", text.strip()):
                made(config, *base, (f"sample.{option}", text))


MEANT = {
    "sample.ig_scale=cosine:1,2": "cosine:1,2",
    "sample.ig_scale=0:1,0.3:2,1:1.5": "0:1,0.3:2,1:1.5",
    "sample.cfg_scale=2": 2.0,
    "sample.ig_interval=0,0.7": (0.0, 0.7),
    "optimizer.train_only=inter_heads,final_head": ("inter_heads", "final_head"),
    "optimizer.train_only=(inter_heads, final_head)": ("inter_heads", "final_head"),
    "optimizer.train_only=['inter_heads']": ("inter_heads",),
    "ema.decays=0.999,0.9999": (0.999, 0.9999),
    "optimizer.learning_rate=1": 1.0,
    "run.steps=1_000": 1000,
    "run.steps=010": 10,
    "seed=0x10": 16,
    "data.in_memory=false": False,
    "name=a=b": "a=b",
    "data.split=train[:90%]": "train[:90%]",
    "model.attention=xla": "xla",  # left out of the file
}


@pytest.mark.parametrize("written", MEANT)
def test_a_value_is_read_by_the_type_of_its_setting(written):
    key, _, text = written.partition("=")
    value, wanted = value_of(made("digits", (key, text)), key), MEANT[written]
    assert value == wanted and type(value) is type(wanted)


@pytest.mark.parametrize("text", ["999999999999", "-999999999999", "2147483648"])
def test_a_whole_number_that_no_arithmetic_here_holds_is_refused(text):
    with refused("config.optimizer.warmup_steps", int(text), expected="below 2^31"):
        made("digits", ("optimizer.warmup_steps", text))


ARGUMENTS = {
    ("--config.run.steps=3",): [("run.steps", "3")],
    ("--config.run.steps", "3"): [("run.steps", "3")],
    ("--config.process.time_mean", "-1"): [("process.time_mean", "-1")],
    ("--config.data.in_memory", "--workdir=x"): [("data.in_memory", "True")],
    ("--noconfig.data.in_memory",): [("data.in_memory", "False")],
    ("-config.name=a\nb",): [("name", "a\nb")],
}


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_overrides_are_written_as_flags_are(arguments):
    assert files._split(list(arguments))[1] == ARGUMENTS[arguments]


def test_overrides_in_a_flag_file_count(tmp_path):
    (tmp_path / "flags").write_text("--config.run.steps=3\n--config.data.batch_size=16\n")
    values = files.ConfigFlags("")
    values(["x", f"--flagfile={tmp_path}/flags", f"--config={toy.ROOT}/configs/digits.py", "--config.run.steps=4"])
    e = values.experiment()
    assert (e.run.steps, e.data.batch_size) == (4, 16)


def test_the_settings_of_a_run_are_a_config(tmp_path):
    """For another run by --config, for itself by the work directory alone; a folder that is no run is one line."""
    (tmp_path / "config.json").write_text(json.dumps(made("digits", ("run.steps", "7")).as_dict()))
    for given in ([f"--config={tmp_path}"], [f"--config={tmp_path}/config.json"], []):
        values = files.ConfigFlags("")
        values(["x", *given, "--config.data.batch_size=16"])
        e = values.experiment(None if given else str(tmp_path))
        assert e == made("digits", ("run.steps", "7"), ("data.batch_size", "16"))
    values(["x"])
    with refused("--config", says="holds no run"):
        values.experiment(str(tmp_path / "nothing"))


@pytest.mark.parametrize("folder", ["a,b", "lr=1e-3,bs=16", "a:b", "with space é"])
def test_a_config_file_and_a_run_may_have_names_with_commas_and_colons(folder, tmp_path, monkeypatch):
    place = tmp_path / folder
    place.mkdir()
    (place / "my.py").write_text("def get_config(argument=''):\n    return {'argument': argument}\n")
    values = files.ConfigFlags("")
    values(["x", f"--config={place}/my.py:word,{place}"])
    assert values.load() == {"argument": f"word,{place}"}
    seen = []

    def stored(checkpoint):
        seen.append(checkpoint)
        return {"config": made("digits").as_dict()}

    monkeypatch.setattr("ig_jax.checkpoints.steps.stored_meta", stored)
    config, chosen = files.from_checkpoint(f"{place},runlocal", ("head", "everything"))
    assert seen == [str(place)] == [config.init.checkpoint] and chosen == ("head", "runlocal")


@pytest.mark.parametrize(
    "content, says",
    [
        ("x = 1", "must be a file that defines get_config"),
        ("def get_config():\n    return 3", "a file whose get_config returns a config"),
        ("def get_config():\n    raise KeyError('here')", "here"),
        ("this is no Python", "invalid syntax"),
    ],
)
def test_a_config_file_that_cannot_be_used_is_refused(content, says, tmp_path):
    (tmp_path / "bad.py").write_text(content)
    values = files.ConfigFlags("")
    values(["x", f"--config={tmp_path}/bad.py"])
    with refused("--config", says=says):
        values.load()


@pytest.mark.parametrize("path", ["nowhere.py", "configs", "x" * 5000, "gs://bucket/config.py:a", ":"])
def test_a_config_file_that_is_not_there_is_refused(path):
    values = files.ConfigFlags("")
    values(["x", f"--config={path}"])
    with refused("--config", path, fix="digits, "):
        values.load()


def test_hints_cover_every_setting():
    """The walk above reads the sections of one experiment; both optimizers are among the configs."""
    names = {made(config).optimizer.name for config in CONFIGS}
    assert names == {"adamw", "muon"} and len(typing.get_type_hints(Experiment)) == len(dataclasses.fields(Experiment))
