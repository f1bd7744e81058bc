"""Reports of many runs as one table."""

GIB = 2**30


def markdown(results: list[dict]) -> str:
    """A table of what --results wrote; the last result of a run on a target is the one that counts."""
    latest = {(r["run"], r["target"], r["batch"]): r for r in results}
    lines = ["| run | target | batch | mesh data x fsdp | remat, parts | GiB a device | exchanged a step | estimate |",
             "|---|---|---|---|---|---|---|---|"]
    rows = sorted(latest.values(), key=lambda r: (r["run"], r["batch"]))
    return "\n".join(lines + [_row(result) for result in rows])


def _row(result: dict) -> str:
    train, mesh = result["train"], result["mesh"]
    exchanged = ", ".join(f"{kind} {sum(axes.values()) / 1e9:.2f} GB" for kind, axes in train["collectives"].items()
                          if sum(axes.values()) > 1e7)
    rate = f"{result['images_per_second']:,.0f} images/s" if result["images_per_second"] else "-"
    memory = f"{train['used'] / GIB:.1f} of {train['limit'] / GIB:.1f}" + ("" if train["fits"] else ", DOES NOT FIT")
    return (f"| {result['run']} | {result['devices']} x {result['target'].split(':')[1]} | {result['batch']} | "
            f"{mesh['data']} x {mesh['fsdp']} | {result['remat']}, {result['accumulate']} | {memory} | "
            f"{exchanged or 'nothing'} | {rate} |")
