"""Choice of one set of weights in a file: the average, the raw weights, or the one a user names."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ig_jax.base.errors import damaged
from ig_jax.weightfiles.files import WeightFile, open_weights
from ig_jax.weightfiles.tensor_storage import OTHER_FILE, LazyTensor, Mark, shown

# What wrappers of torch put before the names of a module: DistributedDataParallel, AveragedModel, torch.compile,
# FSDP, activation checkpointing. The first is a common word and is removed only where it leads.
_LEADING = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_AVERAGE = {"shadow", "average", "averaged", "avg", "swa"}
_RAW = {"online", "raw"}
_BARE = ("", "state_dict")  # places of the only set of a published file, which is an average


@dataclass(frozen=True)
class Chosen:
    """One set of weights: its tensors by the names inside the network, and where it stands in the file."""

    tensors: dict[str, LazyTensor]
    label: str  # such as "ema", "state_dict.net" or "" for all of the file
    average: bool  # False for raw weights
    outside: tuple[str, ...]  # what stands next to the network in the same dict, such as "teacher" or "step"


class _Candidate(NamedTuple):
    place: str  # key of WeightFile.sets
    prefix: str  # of the names in the set, with its last dot
    label: str  # of both


def _is_average(label: str) -> bool:
    """Whether a place is called an average; its last component that says either decides."""
    for part in reversed(label.lower().split(".")):
        words = set(re.split(r"[_\W]+", part))
        if words & _RAW:
            return False
        if words & _AVERAGE or any(word.startswith("ema") for word in words):
            return True
    return False


def holds(file: WeightFile, anchors: Sequence[str]) -> bool:
    """Whether any set of the file has a network with one of these tensors."""
    return any(_prefixes(entries, anchors) for entries in file.sets.values())


def choose(file: WeightFile, which: str, anchors: Sequence[str] = ()) -> Chosen:
    """The set `which`: "ema" for the average, "model" for the raw weights, "" for either, or the place of one.

    anchors: names of a tensor that shows where a network begins; without any, a network is a whole dict of the file.
    Raw weights are taken for the average only from a file that has one set under no telling name, as the published
    ones do.  Raises: UserError where the set is missing, two fit, or it holds what is no tensor.
    """
    names = {place: _unwrapped(file, place) for place in file.sets}
    found = [(place, prefix) for place in names for prefix in _prefixes(names[place], anchors)]
    found = found or [(place, "") for place in names]  # of no known network: named by what is missing, later
    candidates = [_Candidate(*both, ".".join(filter(None, both)).removesuffix(".")) for both in found]
    averages = [c for c in candidates if _is_average(c.label)]
    raw = [c for c in candidates if c not in averages]
    if which == "ema":
        exact = [c for c in averages if c.label == "ema"]
        others = [*names, *file.metadata, *(str(key).split(".")[0] for place in _BARE for key in names.get(place, {}))]
        plain = len(raw) == 1 and raw[0].place in _BARE and not any(map(_is_average, map(str, others)))
        fitting = exact or averages or (raw if plain else [])
    elif not which:
        fitting = averages or raw
    elif which == "model":
        fitting = [c for c in raw if c.label == "model"] or raw
    else:
        fitting = [c for c in candidates if c.label == which] or [
            c for c in candidates if f".{which}." in f".{c.label}."
        ]
    if len(fitting) != 1:
        listed = ", ".join(f'"{c.label or "the file itself"}"' for c in (fitting or candidates)[:8])
        what = f'holds several "{which}" weights: {listed}' if fitting else f'holds no "{which}" weights, only {listed}'
        example = (fitting or candidates)[0].label or "model"
        raise file.source.refusal(what, f"name the set, such as --which={example}")
    return _chosen(file, fitting[0], names[fitting[0].place], [c for c in candidates if c != fitting[0]])


def _prefixes(names: dict, anchors: Sequence[str]) -> list[str]:
    if not anchors:
        return [""]
    texts = [name for name in names if type(name) is str]
    return sorted({name.removesuffix(a) for name in texts for a in anchors if f".{name}".endswith(f".{a}")})


def _unwrapped(file: WeightFile, place: str) -> dict:
    """The entries of a set without the names of wrappers in their keys.  Raises: UserError where two keys clash."""
    found: dict = {}
    for key, value in file.sets[place].items():
        name = _without_wrappers(key) if type(key) is str else key
        if name in found:
            what = f'has {shown(name)} twice in "{place}", with and without the name of a wrapper such as "module."'
            raise file.source.refusal(what, OTHER_FILE)
        found[name] = value
    return found


def _without_wrappers(name: str) -> str:
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in _LEADING:
        parts = parts[1:]
    return ".".join(part for part in parts if part not in _LEADING[1:])


def _chosen(file: WeightFile, candidate: _Candidate, names: dict, others: list[_Candidate]) -> Chosen:
    """Its tensors; what lies outside its prefix is named unless it is another set."""
    tensors: dict[str, LazyTensor] = {}
    outside: dict[str, None] = {}  # in order
    prefixes = tuple(c.prefix for c in others if c.place == candidate.place and c.prefix)
    for key, value in names.items():
        inside = type(key) is not str or key.startswith(candidate.prefix)
        if inside and type(value) in (LazyTensor, Mark):
            if type(key) is not str or not key.isprintable() or len(key) > 1000:
                raise file.source.refusal(f"has a tensor named {shown(key)}", "rename it and save again")
            if type(value) is not LazyTensor:
                what = f"has {shown(value)} instead of a tensor as {shown(key)}"
                raise file.source.refusal(what, OTHER_FILE)
            if key.startswith(prefixes) and not candidate.prefix.startswith(prefixes):
                continue  # another network inside this one's dict
            name = _without_wrappers(key.removeprefix(candidate.prefix))
            if name in tensors:
                raise file.source.refusal(f"has {shown(name)} with and without the name of a wrapper", OTHER_FILE)
            tensors[name] = value
        elif not inside and type(value) is LazyTensor and not key.startswith(prefixes):
            outside[key.split(".")[0]] = None
    return Chosen(tensors, candidate.label, _is_average(candidate.label), tuple(outside))


def channel_statistics(file: Path, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std (C,) float64 in a file such as VA-VAE's latents_stats.pt.  Raises: UserError for other latents."""
    with open_weights(file) as weights:
        tensors = choose(weights, "").tensors
        if not {"mean", "std"} <= tensors.keys():
            raise damaged(file, f"has {', '.join(sorted(tensors))}, not mean and std")
        mean, std = (tensors[name].read().astype(np.float64).reshape(-1) for name in ("mean", "std"))
    if not len(mean) == len(std) == channels:
        raise damaged(file, f"has statistics of {len(mean)} and {len(std)} channels, the latents have {channels}")
    for channel in np.flatnonzero(~(np.isfinite(mean) & np.isfinite(std) & (std > 0))):
        raise damaged(file, f"has mean {mean[channel]:g} and std {std[channel]:g} of channel {channel}")
    return mean, std
