"""From the flags to the table: cases, workers, turns, records."""

import dataclasses
import itertools
import tempfile
from pathlib import Path

from ig_jax.benchmarking import cases, peer, peer_numbers, report, starts, table
from ig_jax.benchmarking.cases import Case
from ig_jax.benchmarking.compare import Plan, Variant, compare
from ig_jax.benchmarking.variants import variants_of
from ig_jax.errors import UserError
from ig_jax.files import append_lines
from ig_jax.progress import Progress


@dataclasses.dataclass(frozen=True)
class Request:
    """What the flags asked for."""

    command: str
    models: tuple[str, ...]
    config: str
    axes: dict[str, list]  # values of each axis of cases.changed; none for as it is
    plan: Plan
    peers: tuple[bool, ...]  # of diffusers: whether each is compiled
    results: Path


def run(request: Request) -> list[dict]:
    """Measure, print the table and add the records to the results; the records.

    Raises: UserError for a case that cannot be, RuntimeError when one failed for another reason than memory;
    the others are measured before.
    """
    groups = cases.grouped(all_cases(request))
    append_lines(request.results, [])
    if request.peers:
        peer.check_installed()
        for group in groups:
            peer_numbers.check_comparable(group[0], request.command)
    with tempfile.TemporaryDirectory() as cache:
        variants = [variants_of(request.command, group, request.peers, cache) for group in groups]
        lines, pairs = _measured(request, variants)
    print(table.table(request.command, lines))
    if pairs:
        print(f"\n{table.ratios(pairs)}")
    print(f"\n{len(lines)} records added to {request.results}")
    for variant in itertools.chain(*variants):
        if isinstance(variant.failure, UserError):
            raise variant.failure
        if variant.failure is not None and not variant.failure.is_memory:
            raise RuntimeError(f"{variant.label}: {variant.failure}\n{variant.failure.detail}")
    return lines


def _measured(request: Request, variants: list[list[Variant]]) -> tuple[list[dict], list[dict]]:
    """The records of all variants, added to the results as they come, and the ratios to peers."""
    lines, pairs = [], []
    with Progress(_events(request, variants), "turns") as progress:

        def said(variant: Variant, text: str) -> None:
            progress.advance()
            progress.show(f"{variant.label}: {text}")

        for group in variants:
            _measure(request, group, said)
            if all(isinstance(variant.failure, UserError) for variant in group):
                raise group[0].failure
            found = ratios(group)
            records = [line for variant in group for line in report.records(request.command, variant)]
            for line in records:
                line["ratios"] = [pair for pair in found if pair["ours"] == line["label"]]
            append_lines(request.results, records)
            lines, pairs = lines + records, pairs + found
    return lines, pairs


def all_cases(request: Request) -> list[Case]:
    """Every case of the request.  Raises: UserError for one that cannot be."""
    bases = [cases.of_config(request.config)] if request.config else map(cases.published, request.models)
    return [case for base in bases for case in cases.expanded(base, request.axes)]


def _measure(request: Request, group: list[Variant], said) -> None:
    single = {"compile": starts.start_twice, "kernels": starts.measure_kernels}.get(request.command)
    if single is None:
        compare(group, request.plan, said)
        return
    for variant in group:
        single(variant, said)


def _events(request: Request, variants: list[list[Variant]]) -> int:
    """How often `said` will be called when nothing fails and all variants of a group share a host."""
    each = {"compile": 2, "kernels": 1}.get(request.command, request.plan.repeats + 2)
    return each * sum(map(len, variants))


def ratios(group: list[Variant]) -> list[dict]:
    """Each of ours over each peer of its precision, where both have been measured."""
    done = [variant for variant in group if variant.failure is None and variant.turns]
    return [
        report.compared(ours, other) for ours, other in itertools.product(done, done)
        if ours.framework == "ig_jax" and other.framework != "ig_jax"
        and ours.case.model.dtype == other.case.model.dtype
    ]
