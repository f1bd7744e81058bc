"""The table of ig_jax/forecast/RESULTS.md, from a file that `preflight --results=FILE` wrote."""

import json
import sys
from pathlib import Path

from ig_jax.forecast.report import GIB, rough


def markdown(results: list[dict]) -> str:
    """A table of the JSON of many reports; of several reports of one run, target and batch, the last one counts."""
    latest = {(r["run"], r["target"], r["batch"]): r for r in results}
    lines = [
        "| run | target | batch | data x fsdp | remat, micro-batches | GiB a device | exchanged a step | estimate |",
        "|" + 8 * "---|",
    ]
    return "\n".join(lines + [_row(r) for r in sorted(latest.values(), key=lambda r: (r["run"], r["batch"]))])


def _row(result: dict) -> str:
    train, mesh, guess = result["train"], result["mesh"], result["train"]["estimate"]
    sums = {kind: sum(axes.values()) for kind, axes in train["collectives"].items()}
    exchanged = ", ".join(f"{kind} {size / 1e9:.2f} GB" for kind, size in sums.items() if size > 1e7) or "nothing"
    memory = f"{train['used'] / GIB:.1f} of {train['limit'] / GIB:.1f}"
    memory += "" if train["used"] <= train["limit"] else ", DOES NOT FIT"
    rate = "-"
    if guess:
        rate = f"{rough(result['batch'] / (guess['products'] + guess['memory'] + guess['exchange']))} images/s"
    devices, fit = (
        f"{result['devices']} x {result['target'].split(':')[1]}",
        f"{result['remat']}, {result['accumulate']}",
    )
    return (
        f"| {result['run']} | {devices} | {result['batch']} | {mesh['data']} x {mesh['fsdp']} | {fit} | {memory} | "
        f"{exchanged} | {rate} |"
    )


if __name__ == "__main__":
    print(markdown([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]))
