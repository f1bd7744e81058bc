"""The table of ig_jax/forecast/RESULTS.md, from a file that `preflight --results=FILE` wrote."""

import json
import sys
from pathlib import Path

from ig_jax.forecast.report import binary, exchanged, rough


def markdown(results: list[dict]) -> str:
    """A table of the JSON of many reports; of several reports of one run, target and batch, the last one counts."""
    latest = {(r["run"], r["target"], r["batch"]): r for r in results}
    lines = [
        "| run | target | batch | data x fsdp | remat, micro-batches | memory a device | exchanged a step | estimate |",
        "|" + 8 * "---|",
    ]
    return "\n".join(lines + [_row(r) for r in sorted(latest.values(), key=lambda r: (r["run"], r["batch"]))])


def _row(result: dict) -> str:
    train, mesh, guess = result["train"], result["mesh"], result["train"]["estimate"]
    memory = f"{binary(train['used'])} of {binary(train['limit'])}"
    memory += "" if train["used"] <= train["limit"] else ", DOES NOT FIT"
    rate = "-"
    if guess:
        rate = f"{rough(result['batch'] / (guess['products'] + guess['memory'] + guess['exchange']))} images/s"
    kind, model, *_ = result["target"].split(":")
    device, fit = "cpu" if kind == "cpu" else model, f"{result['remat']}, {result['accumulate']}"
    return (
        f"| {result['run']} | {result['devices']} x {device} | {result['batch']} | {mesh['data']} x {mesh['fsdp']} | "
        f"{fit} | {memory} | {exchanged(train['collectives'], axes=False)} | {rate} |"
    )


if __name__ == "__main__":
    print(markdown([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]))
