"""From what was measured of a variant to the numbers that are read: one flat record for each."""

import dataclasses
import datetime
import importlib.metadata
import subprocess
from pathlib import Path

import ig_jax
from ig_jax.benchmarking.cases import Case
from ig_jax.benchmarking.compare import Variant
from ig_jax.benchmarking.timing import Spread, ratio
from ig_jax.errors import UserError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
# What the optimizer and one EMA must move for a parameter in float32: gradient, weight, two moments and the
# average read, four of them written, and the gradient once more for the norm that clips.
OPTIMIZER_BYTES = 40
STARTS = ("first_start_s", "first_start_cpu_s", "second_start_s", "second_start_cpu_s", "compilations",
          "compiled_again")


def records(command: str, variant: Variant) -> list[dict]:
    """Everything about one variant as JSON types, null where a machine or a command does not say; of the hot
    spots one record for each.
    """
    case, line = variant.case, _described(command, variant)
    if variant.failure is not None:
        fits = isinstance(variant.failure, UserError) or not variant.failure.is_memory
        return [line | {"failure": str(variant.failure) if fits else "out of memory"}]
    if command == "kernels":
        peak = variant.report["peak"] / 1e12
        return [line | row | {"peak_tflops": peak} for row in variant.report["rows"]]
    return [line | _times(case, variant) | _limits(variant) | _optimizer(variant) | _rest(case, variant)]


def _described(command: str, variant: Variant) -> dict:
    """What every record begins with."""
    case = variant.case
    return {
        "command": command, "label": variant.label, "framework": variant.framework,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions() | variant.report.get("versions", {}), "commit": commit(),
        "hardware": variant.report.get("hardware"), "batch": case.batch, "case": case.as_dict(),
        "parameters": variant.report.get("parameters"), "mesh": variant.report.get("mesh"),
        "fit": variant.report.get("fit"),
        "evaluations_per_image": variant.report.get("evaluations"), "flops_per_call": variant.report.get("flops"),
    }


def _times(case: Case, variant: Variant) -> dict:
    if not variant.turns:
        return {}
    wall, cpu = variant.spread("wall"), variant.spread("cpu")
    flops = variant.report.get("flops")
    foreign = [turn.foreign for turn in variant.turns if turn.foreign is not None]
    return {
        "images_per_second": case.batch / wall.median, **_milliseconds("ms", wall), **_milliseconds("cpu_ms", cpu),
        "tflops": flops / wall.median / 1e12 if flops else None, "foreign": max(foreign) if foreign else None,
        "turns": [dataclasses.astuple(turn) for turn in variant.turns], "calls_a_turn": variant.report.get("calls"),
    }


def _milliseconds(name: str, spread: Spread) -> dict:
    return {name: 1e3 * spread.median, f"{name}_min": 1e3 * spread.low, f"{name}_max": 1e3 * spread.high}


def _limits(variant: Variant) -> dict:
    """The devices' own speed, and the share of it that the work reached. Host devices share one host."""
    extras, report = variant.extras, variant.report
    if "peak" not in extras:
        return {}
    devices = 1 if report["hardware"]["platform"] == "cpu" else report["used_devices"]
    rate = report["flops"] / variant.spread("wall").median if report["flops"] and variant.turns else None
    share = lambda limit: rate / (limit * devices) if rate and limit else None  # noqa: E731
    return {"peak_tflops": extras["peak"] / 1e12, "of_peak": share(extras["peak"]),
            "of_datasheet": share(extras["datasheet"]), "bandwidth": extras["bandwidth"]}


def _optimizer(variant: Variant) -> dict:
    """The pass over weights, moments and averages: its share, and its bytes against what must be moved."""
    measured = variant.extras.get("optimizer")
    if not measured:
        return {}
    seconds, count = measured["seconds"], measured["parameters"]
    devices = 1 if variant.report["hardware"]["platform"] == "cpu" else variant.report["used_devices"]
    bandwidth = variant.extras["bandwidth"] * devices
    compiled = measured["compiled_bytes"]
    return {
        "optimizer_ms": 1e3 * seconds,
        "optimizer_share": seconds / variant.spread("wall").median if variant.turns else None,
        "optimizer_floor_ms": 1e3 * OPTIMIZER_BYTES * count / bandwidth,
        "optimizer_bytes_per_parameter": seconds * bandwidth / count,
        "optimizer_compiled_bytes_per_parameter": compiled * devices / count if compiled else None,
    }


def _rest(case: Case, variant: Variant) -> dict:
    extras, report = variant.extras, variant.report
    seconds, rate = report.get("seconds") or extras.get("seconds") or {}, extras.get("data")
    memory = extras.get("memory", {})
    return {
        **{f"{name}_s": seconds.get(name) for name in ("trace", "lower", "compile")},
        "compile_all_s": sum(seconds.values()) if seconds else None, "first_call_s": report.get("first_call"),
        "memory": memory, "peak_bytes": memory.get("device") or memory.get("process"),
        "data_images_per_second": rate,
        "data_share": case.batch / rate / variant.spread("wall").median if rate and variant.turns else None,
        **{name: extras[name] for name in ("loss", "finite") if name in extras},
        **{name: report[name] for name in STARTS if name in report},
    }


def compared(ours: Variant, peer: Variant) -> dict:
    """Time of ours over time of the peer, by both clocks: median, least, greatest of neighbouring turns."""
    return {
        "ours": ours.label, "peer": peer.label,
        "wall": dataclasses.asdict(ratio(ours.wall, peer.wall)), "cpu": dataclasses.asdict(ratio(ours.cpu, peer.cpu)),
        "peer_parameters": peer.report.get("parameters"), "our_parameters": ours.report.get("parameters"),
    }


def versions() -> dict[str, str]:
    """This project and what it runs on."""
    found = {"ig_jax": ig_jax.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of this checkout, None where there is none."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
