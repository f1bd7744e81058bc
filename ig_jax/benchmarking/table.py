"""Records as one aligned table, and ratios as sentences."""

from collections.abc import Callable

DASH = "-"
RATIOS = (
    "time of ours / time of the peer, median (least-greatest of neighbouring turns), below 1 is faster;\n"
    "the peer computes one output head where ours computes two, and has a label table in every block:"
)


def _number(key: str, form: str = "{:,.1f}") -> Callable[[dict], str]:
    return lambda line: DASH if line.get(key) is None else form.format(line[key])


def _word(key: str) -> Callable[[dict], str]:
    return lambda line: line.get(key, DASH)


def _of_peak(key: str) -> Callable[[dict], str]:
    return lambda line: DASH if line.get(key) is None else f"{line[key] / line['peak_tflops']:.1%}"


def _percent(key: str) -> Callable[[dict], str]:
    return _number(key, "{:.1%}")


def _range(key: str) -> Callable[[dict], str]:
    def cell(line: dict) -> str:
        if line.get(key) is None:
            return DASH
        digits = 0 if line[key] >= 100 else 2
        return f"{line[key]:,.{digits}f} ({line[f'{key}_min']:,.{digits}f}-{line[f'{key}_max']:,.{digits}f})"

    return cell


def _gibibytes(*keys: str) -> Callable[[dict], str]:
    def cell(line: dict) -> str:
        value = line
        for key in keys:
            value = (value or {}).get(key)
        return f"{value / 2**30:,.2f}" if value else DASH

    return cell


CASE = ("case", lambda line: line["label"])
SPEED = (
    ("images/s", _number("images_per_second", "{:,.2f}")), ("ms (min-max)", _range("ms")),
    ("CPU ms (min-max)", _range("cpu_ms")), ("TFLOP/s", _number("tflops", "{:,.3f}")),
    ("of peak", _percent("of_peak")), ("of sheet", _percent("of_datasheet")),
)
OPTIMIZER = (
    ("opt ms", _number("optimizer_ms")), ("of step", _percent("optimizer_share")),
    ("B/param", _number("optimizer_bytes_per_parameter", "{:.0f}")),
)
COST = (("GiB", _gibibytes("peak_bytes")), ("compile s", _number("compile_all_s", "{:.1f}")),
        ("others", _percent("foreign")))
COLUMNS = {
    "train": (CASE, *SPEED, *OPTIMIZER, ("data", _percent("data_share")), *COST),
    "sample": (CASE, ("evals", _number("evaluations_per_image", "{:.0f}")), *SPEED, *COST),
    "data": (CASE, ("loader images/s", _number("data_images_per_second", "{:,.0f}")),
             ("step images/s", _number("images_per_second", "{:,.0f}")), ("loader of step", _percent("data_share"))),
    "memory": (CASE, ("parameters", _number("parameters", "{:,d}")), ("device GiB", _gibibytes("memory", "device")),
               ("program GiB", _gibibytes("memory", "program")), ("process GiB", _gibibytes("memory", "process"))),
    "compile": (CASE, *((f"{stage} s", _number(f"{stage}_s", "{:.2f}")) for stage in ("trace", "lower", "compile")),
                ("first start s", _number("first_start_s", "{:.2f}")),
                ("second start s", _number("second_start_s", "{:.2f}")),
                ("compilations", _number("compilations", "{:d}")), ("again", _number("compiled_again", "{:d}"))),
    "kernels": (CASE, ("kernel", _word("kernel")), ("shape", _word("shape")),
                ("forward ms", _number("forward_ms", "{:,.3f}")), ("of peak", _of_peak("forward_tflops")),
                ("with backward", _number("both_ms", "{:,.3f}")), ("of peak", _of_peak("both_tflops")),
                ("error", _number("error", "{:.1e}")), ("gradient", _number("gradient_error", "{:.1e}"))),
}


def table(command: str, lines: list[dict]) -> str:
    """Aligned columns for the records of a command, empty ones left out; what failed says so in one piece."""
    columns = [(head, cell) for head, cell in COLUMNS[command] if any(cell(line) != DASH for line in lines)]
    rows = [[head for head, _ in columns]]
    for line in lines:
        head = f"{line['label']} {line.get('kernel', '')}".rstrip()
        rows.append([head, line["failure"]] if "failure" in line else [cell(line) for _, cell in columns])
    whole = [row for row in rows if len(row) == len(columns)]
    widths = [max(len(row[i]) for row in whole) for i in range(len(columns))]
    widths[0] = max(len(row[0]) for row in rows)
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(map(str.rjust, row[1:], widths[1:]) if row in whole else row[1:])])
        for row in rows
    )


def ratios(found: list[dict]) -> str:
    """One line for each pair: ours over the peer."""
    lines = []
    for pair in found:
        wall, cpu = ("{median:.2f} ({low:.2f}-{high:.2f})".format(**pair[clock]) for clock in ("wall", "cpu"))
        lines.append(f"{pair['ours']} / {pair['peer']}: {wall} by the wall, {cpu} by CPU time; "
                     f"parameters {pair['our_parameters']:,} / {pair['peer_parameters']:,}")
    return "\n".join([RATIOS, *lines])
