"""The benchmark from its cases to the table: workers, turns, results, ratios to peers."""

import datetime
import functools
import itertools
import os
import shlex
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from ig_jax.base.errors import UserError, check
from ig_jax.base.files import append_lines, is_dir, local_path
from ig_jax.base.progress import Progress
from ig_jax.base.versions import versions
from ig_jax.benchmarking.cases import Case
from ig_jax.benchmarking.worker import SERVE, THIS, Turn, Variant, Worker, measure
from ig_jax.generation.captions import guidance

Result = dict[str, Any]
PROGRAMS = {"train": "programs:Train", "sample": "programs:Sample", "kernels": "kernels:Kernels"}
DASH = "-"
COLUMNS = {  # of the table: a heading, and how a result is written under it; DASH where it lacks a number
    "case": "{label}",
    "remat x micro-batches": "{fit[remat]} x{fit[accumulate]}",
    "evals": "{evaluations_per_image:.0f}",
    "images/s": "{images_per_second:,.2f}",
    "ms (min-max)": "{ms[median]:,.1f} ({ms[low]:,.1f}-{ms[high]:,.1f})",
    "CPU ms (min-max)": "{cpu_ms[median]:,.1f} ({cpu_ms[low]:,.1f}-{cpu_ms[high]:,.1f})",
    "TFLOP/s": "{tflops:,.3f}",
    "of peak": "{of_peak:.1%}",
    "of sheet": "{of_datasheet:.1%}",
    "GiB": "{peak_gib:,.2f}",
    "compile s": "{compile_s:,.1f}",
    "shape": "{shape}",
    "forward ms": "{forward_ms:,.3f}",
    "of peak forward": "{forward_of_peak:.1%}",
    "with backward": "{both_ms:,.3f}",
    "of peak with both": "{both_of_peak:.1%}",
    "error": "{error:.1e}",
    "gradient": "{gradient_error:.1e}",
}
NOTES = {  # what a column holds, printed where the table has it
    "evals": "forward passes for one image",
    "images/s": "of the median time of a call, on all devices",
    "ms (min-max)": "median, least and greatest time of a turn, of {turns}; CPU ms: of all threads together",
    "of peak": "share of {peak}, which a large square product reaches on one device here",
    "of sheet": "share of what the datasheet of the device says",
    "GiB": "the most that one device held; on a CPU, that the process held",
    "error": "largest difference to XLA's kernel in float32, as a share of the largest value; gradient: the same of it",
}


def run(
    command: str, cases: list[Case], results: Path, repeats: int, warmup: int, profile: str, peers: list[str]
) -> None:
    """Measure the cases, print the table and append a JSON line for each program to the file `results`.

    repeats: turns of each program; warmup: calls before the first; profile: directory for traces, "" for none.
    Raises: UserError for a case that is not possible, RuntimeError when one failed for another reason than memory;
    the others are measured first.
    """
    groups: dict[tuple, list[Variant]] = {}
    everything, pairs = list[Result](), list[Result]()
    with tempfile.TemporaryDirectory() as cache:
        for case in cases:
            groups.setdefault(case.group, []).extend(variants_of(command, case, peers, cache))
        append_lines(results, [])
        with Progress((repeats + 2) * sum(map(len, groups.values())), "turns") as progress:

            def notify(variant: Variant, text: str) -> None:
                progress.advance()
                progress.show(f"{variant.label}: {text}")

            for group in groups.values():
                measure(group, repeats, warmup, profile, notify)
                found = ratios(group)
                lines = [line for variant in group for line in results_of(command, variant)]
                for line in lines:
                    line["ratios"] = [pair for pair in found if pair["case"] == line["label"]]
                append_lines(results, lines)
                everything, pairs = everything + lines, pairs + found
    print("\n".join([table(everything), *notes(command, cases, everything)]))
    for pair in pairs:
        wall, cpu = ("{median:.2f} ({low:.2f}-{high:.2f})".format(**pair[clock]) for clock in Turn._fields)
        print(f"time of {pair['case']} / {pair['peer']}: {wall}, CPU time {cpu}; in () of neighbouring turns")
    print(f"{len(everything)} {'line' if len(everything) == 1 else 'lines'} appended to {results}")
    for variant in itertools.chain(*groups.values()):
        if isinstance(variant.failure, UserError):
            raise variant.failure
        if variant.failure is not None and not variant.failure.is_memory:
            raise RuntimeError(f"{variant.label}: {variant.failure}\n{variant.failure.detail}")


def variants_of(command: str, case: Case, peers: list[str], cache: str) -> list[Variant]:
    """The program of a case, followed by its peers; one that starts again finds its compiled program in `cache`."""
    request, variables = [f"ig_jax.benchmarking.{PROGRAMS[command]}", case.as_dict()], environment(case)
    cached = variables | {"JAX_COMPILATION_CACHE_DIR": cache}
    found = [Variant(case.label, case, functools.partial(Worker, request, cached))]
    for peer in peers:
        program, directory = (SERVE, local_path(peer, "--peer")) if is_dir(peer) else (shlex.split(peer), None)
        check(shutil.which(program[0]) is not None, "--peer", program[0], "a checkout or a command of this machine")
        worker = functools.partial(Worker, request, variables, program, directory)
        found.append(Variant(f"{case.label} {peer}", case, worker, peer))
    return found


def environment(case: Case) -> dict[str, str]:
    """Variables of a worker: threads wait asleep, since others take turns, and as many host devices as the case has."""
    here = str(Path(__file__).parents[2])  # for the commands of peers that import ig_jax
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    variables = {"OMP_WAIT_POLICY": "passive", "PYTHONPATH": path}
    if case.devices:
        kept = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag]
        variables["XLA_FLAGS"] = " ".join([*kept, f"--xla_force_host_platform_device_count={case.devices}"])
    return variables


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest of a series."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratio(times: list[float], peer: list[float]) -> dict[str, float]:
    """The ratio of the medians, and the least and greatest ratio of two neighbouring turns."""
    paired = spread([a / b for a, b in zip(times, peer)])
    return paired | {"median": statistics.median(times) / statistics.median(peer)}


def ratios(group: list[Variant]) -> list[Result]:
    """Time of each case over time of each of its peers, by both clocks."""
    measured = [variant for variant in group if variant.failure is None and variant.turns]
    return [
        {"case": mine.label, "peer": peer.label}
        | {clock: ratio(*([getattr(turn, clock) for turn in v.turns] for v in (mine, peer))) for clock in Turn._fields}
        for mine, peer in itertools.product(measured, measured)
        if mine.framework == THIS != peer.framework and mine.case is peer.case
    ]


def results_of(command: str, variant: Variant) -> list[Result]:
    """The result of a variant as JSON types, None for what is not measured here; one for each kernel."""
    found, extras, case = variant.report, variant.extras, variant.case
    line = {
        "command": command,
        "label": variant.label,
        "framework": variant.framework,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions() | found.get("versions", {}),
        "commit": commit(variant.framework),
        "batch": case.batch,
        "case": case.as_dict(),
        "evaluations_per_image": found.get("evaluations"),
        "flops_per_call": found.get("flops"),
        **{key: found.get(key) for key in ("hardware", "parameters", "mesh", "fit", "compile_s")},
    }
    if variant.failure is not None:
        memory = not isinstance(variant.failure, UserError) and variant.failure.is_memory
        return [line | {"failure": "out of memory" if memory else str(variant.failure)}]
    if command == "kernels":
        peak = {"peak": extras["peak"]}
        return [line | peak | row | {"label": f"{variant.label} {row['kernel']}"} for row in extras["rows"]]
    line |= {name: extras[name] for name in ("peak_bytes", "loss", "finite") if name in extras}
    return [line | (_speed(variant) if variant.turns else {})]


def _speed(variant: Variant) -> Result:
    """Times, rates, and the shares of what the devices can do; the virtual devices of a CPU share one host."""
    found, extras = variant.report, variant.extras
    wall, cpu = (spread(list(series)) for series in zip(*variant.turns))
    rate = found["flops"] / wall["median"] if found.get("flops") else None
    devices = 1 if found["hardware"]["platform"] == "cpu" else found.get("used_devices", 1)
    share = lambda limit: rate / (limit * devices) if rate and limit else None
    return {
        "images_per_second": variant.case.batch / wall["median"],
        "ms": {key: 1e3 * value for key, value in wall.items()},
        "cpu_ms": {key: 1e3 * value for key, value in cpu.items()},
        "turns": variant.turns,
        "tflops": rate / 1e12 if rate else None,
        "peak": extras.get("peak"),
        "of_peak": share(extras.get("peak")),
        "of_datasheet": share(extras.get("datasheet")),
        "peak_gib": extras["peak_bytes"] / 2**30 if "peak_bytes" in extras else None,
    }


def commit(framework: str) -> str | None:
    """The commit of this checkout or of that of a peer, None where there is none."""
    directory = Path(__file__).parent if framework == THIS else Path(framework).expanduser()
    command = ["git", "-C", str(directory), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def table(lines: list[Result]) -> str:
    """The results in aligned columns, empty ones left out, and below them what failed."""
    filled = _columns(lines)
    widths = [max(map(len, column)) for column in filled]
    aligned = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in zip(*filled)]
    return "\n".join(aligned + [f"{line['label']}: {line['failure']}" for line in lines if "failure" in line])


def notes(command: str, cases: list[Case], lines: list[Result]) -> list[str]:
    """What was sampled, and what the columns of the table mean."""
    recipes = [(case.experiment.name, case.experiment.sample) for case in cases if command == "sample"]
    sampled = [f"{name}: {r.solver.name}, {r.steps} steps, {guidance(r)}" for name, r in recipes]
    peaks = {line["case"]["model"]["dtype"]: line["peak"] / 1e12 for line in lines if line.get("peak")}
    facts = {
        "peak": " or ".join(f"{peak:.3g} TFLOP/s in {dtype}" for dtype, peak in peaks.items()),
        "turns": max((len(line.get("turns", ())) for line in lines), default=0),
    }
    heads = [head for column in _columns(lines) if (head := column[0].removesuffix(" forward")) in NOTES]
    return [*dict.fromkeys(sampled), *(f"{head}: {NOTES[head].format(**facts)}" for head in heads)]


def _columns(lines: list[Result]) -> list[tuple[str, ...]]:
    """The columns that have numbers, each with its heading first."""
    measured = [line for line in lines if "failure" not in line]
    rows = [list(COLUMNS), *([_cell(form, line) for form in COLUMNS.values()] for line in measured)]
    return [column for column in zip(*rows) if set(column[1:]) != {DASH}]


def _cell(form: str, line: Result) -> str:
    try:
        return form.format(**line)
    except (KeyError, TypeError):  # nothing, or None
        return DASH
