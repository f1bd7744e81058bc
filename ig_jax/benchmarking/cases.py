"""Cases to measure: an experiment, with single settings changed, on a number of devices; its data are not read."""

import dataclasses
import itertools
from typing import Any

from ig_jax.base.errors import check
from ig_jax.base.schema import bind
from ig_jax.config import published as papers
from ig_jax.config.experiment import Experiment

BATCH = 8  # images, for a published name: any machine has room for them


@dataclasses.dataclass(frozen=True)
class Case:
    """One experiment to measure; `data.batch_size` is its global batch."""

    experiment: Experiment
    devices: int = 0  # how many to use; 0 for all
    varied: tuple[str, ...] = ()  # settings that distinguish the case from others of its sweep

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Case":
        """The case of such a dict as `as_dict` returns."""
        sections = dict(values)
        return cls(devices=sections.pop("devices"), experiment=bind(Experiment, sections))

    def as_dict(self) -> dict[str, Any]:
        """All settings as JSON types."""
        return self.experiment.as_dict() | {"devices": self.devices}

    @property
    def batch(self) -> int:
        """Images of one step or one sampled batch, on all devices."""
        return self.experiment.data.batch_size

    @property
    def label(self) -> str:
        """A short name, unique within one call of the command."""
        return " ".join([self.experiment.name, f"b{self.batch}", self.experiment.model.dtype, *self.varied])

    @property
    def group(self) -> tuple:
        """Equal for two cases that compute the same in different ways, and so take turns."""
        e, manner = self.experiment, dict.fromkeys(("dtype", "scan_blocks", "remat", "attention"))
        return tuple((e.model.__dict__ | manner).items()), self.batch, self.devices, e.sample


def published(name: str) -> Case:
    """The case of a network such as "SiT-XL/2", trained and sampled as in its paper, with a batch of BATCH images."""
    sections = papers.settings(name)
    return Case(bind(Experiment, sections | {"name": name, "data": sections["data"] | {"batch_size": BATCH}}))


def of_config(path: str) -> Case:
    """The case of configs/NAME.py[:argument]."""
    from ig_jax.config.files import sections_of  # late: it needs ml_collections, a published name does not

    return Case(bind(Experiment, sections_of(path)))


def changed(case: Case, key: str, value: Any) -> Case:
    """The case with one setting changed: "devices", or a key of the experiment such as "model.depth".

    A width keeps the head dimension, a depth those intermediate heads that it has room for.
    Raises: UserError for an impossible value.
    """
    if key == "devices":
        check(isinstance(value, int) and value >= 1, "--devices", value, "at least 1")
        return dataclasses.replace(case, devices=value)
    section, name = key.split(".")
    e, model, sections = case.experiment, case.experiment.model, case.experiment.as_dict()
    sections[section][name] = value
    if section == "sample":  # another solver brings its own options
        sections["sample"] = e.sample.replace(**{name: value}).flat()
    if key == "model.width":
        head_dim = model.width // model.num_heads
        whole = isinstance(value, int) and value % head_dim == 0
        check(whole, "--width", value, f"a multiple of the head dimension {head_dim} of {e.name}")
        sections["model"]["num_heads"] = value // head_dim
    if key == "model.depth" and isinstance(value, int):
        depths = sorted({min(depth, value) for depth in model.inter_depth})
        sections["model"]["inter_depth"] = depths
        sections["loss"]["inter_weight"] = e.loss.inter_weight[: len(depths)]
    return dataclasses.replace(case, experiment=bind(Experiment, sections))


def expanded(base: Case, axes: dict[str, list]) -> list[Case]:
    """Every combination of the values of the axes, {key: values}."""
    cases = []
    for values in itertools.product(*axes.values()):
        case, varied = base, []
        for key, value in zip(axes, values):
            case = changed(case, key, value)
            if len(axes[key]) > 1 and key not in ("data.batch_size", "model.dtype"):  # those are in every label
                varied.append(f"{key.split('.')[-1]}={value}")
        cases.append(dataclasses.replace(case, varied=tuple(varied)))
    return cases
