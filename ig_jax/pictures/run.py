"""The story of a training run as one picture, from the lines of its metrics.jsonl."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from ig_jax.pictures.plots import BLACK, GREY, LINE, NARROWEST, Page, font, wrapped

TEXT = 15
WIDTH, HEIGHT = 400, 250  # of one panel's data area
LEFT, TOP, ACROSS, DOWN = 70, 60, 100, 110  # margins, and the space between panels
COLOURS = ("#1f5fbf", "#d1701c", "#2e8b57", "#8a4fae", "#b03a48", "#5f6b7a")
LEVEL = 10  # labels of points that fit side by side
PARTS = 4  # of the run, from light to dark, over each of which a curve by noise level or depth is averaged


def picture(lines: Sequence[dict], caption: str) -> np.ndarray:
    """Draw loss, curves by noise level and depth, and where the time went; uint8 (h, w, 3)."""
    panels = [
        ("Loss", lambda axes: _over_steps(axes, lines, ("loss/", "held_out/"))),
        ("Error by noise level", lambda axes: _by_point(axes, lines, ["sigma/final", "sigma/intermediate"], "sigma")),
        ("Gap |D_f - D_i| by noise level", lambda axes: _by_point(axes, lines, ["sigma/gap"], "sigma")),
        ("Cosine of gap and what D_i lacks", lambda axes: _by_point(axes, lines, ["sigma/cosine"], "sigma")),
        ("Guidance scale nearest to the data", lambda axes: _by_point(axes, lines, ["sigma/scale"], "sigma", limit=8)),
        ("Gradient norm by depth", lambda axes: _by_point(axes, lines, ["gradient"], "")),
        ("Update norm by depth", lambda axes: _by_point(axes, lines, ["update"], "")),
        ("Norm of the whole gradient", lambda axes: _over_steps(axes, lines, ("gradient_norm",))),
        ("Wall time", lambda axes: _seconds(axes, lines)),
    ]
    across = 3
    width = 2 * LEFT + across * WIDTH + (across - 1) * ACROSS
    text = wrapped(caption, 0.85 * TEXT, width - 2 * LEFT)
    down = math.ceil(len(panels) / across)
    page = Page(max(width, NARROWEST), TOP + down * (HEIGHT + DOWN) + round(1.3 * TEXT * len(text)) + TEXT)
    for i, (title, draw) in enumerate(panels):
        left, top = LEFT + i % across * (WIDTH + ACROSS), TOP + i // across * (HEIGHT + DOWN)
        page.text(left, top - 1.2 * TEXT, title, 1.1 * TEXT)
        axes = page.axes(left, top, WIDTH, HEIGHT)
        draw(axes)
        _finish(axes)
    page.lines(LEFT, page.height - round(1.3 * TEXT * len(text)) - TEXT // 2, text, 0.85 * TEXT)
    return page.pixels()


def _finish(axes: Axes) -> None:
    drawn = np.concatenate([line.get_ydata() for line in axes.lines] or [np.ones(1)]).astype(float)
    drawn = drawn[np.isfinite(drawn)]
    if drawn.size and drawn.min() > 0 and drawn.max() > 10 * drawn.min():
        axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=LINE)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=0.8 * TEXT, colors=GREY, labelfontfamily="DejaVu Sans")
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_fontproperties(font(0.85 * TEXT))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(prop=font(0.8 * TEXT), frameon=False)
    elif not axes.has_data():
        axes.text(0.5, 0.5, "not measured", font=font(TEXT), color=GREY, ha="center", transform=axes.transAxes)


def _over_steps(axes: Axes, lines: Sequence[dict], prefixes: tuple[str, ...]) -> None:
    """Every metric whose name begins with one of `prefixes`, over the steps."""
    found = {name for line in lines for name in line if name.startswith(prefixes)}
    names = sorted(found, key=lambda name: (not name.startswith(prefixes[0]), name))
    for colour, name in zip(COLOURS, names):
        steps, values = zip(*[(line["step"], line[name]) for line in lines if name in line])
        marker = "o" if len(steps) == 1 else None
        axes.plot(
            steps, values, color=colour, label=name.removeprefix(prefixes[0]) or None, linewidth=1.4, marker=marker
        )
    axes.set_xlabel("step")


def _by_point(axes: Axes, lines: Sequence[dict], names: Sequence[str], label: str, limit: float = math.inf) -> None:
    """Curves by noise level or depth: the mean of each of PARTS parts of the run, the last one dark.

    limit: values beyond +-limit are left out.
    """
    for colour, name in zip(COLOURS, names):
        found = [line for line in lines if name in line]
        parts = [part for part in np.array_split(np.arange(len(found)), PARTS) if len(part)]
        for part, alpha in zip(parts, np.linspace(0.25, 1, len(parts)) if len(parts) > 1 else [1]):
            points = list(found[part[-1]][name])
            means = [_mean([found[i][name].get(point) for i in part], limit) for point in points]
            last = part[-1] == len(found) - 1
            title = f"{name.partition('/')[2] or name}, steps {found[part[0]]['step']}-{found[part[-1]]['step']}"
            axes.plot(points, means, color=colour, alpha=alpha, marker="o", markersize=3, label=title if last else None)
    axes.set_xlabel(label)
    axes.tick_params(axis="x", rotation=90 if axes.has_data() and len(axes.get_xticks()) > LEVEL else 0)


def _mean(values: Sequence[float | None], limit: float) -> float:
    known = [value for value in values if value is not None and abs(value) <= limit]
    return sum(known) / len(known) if known else math.nan


def _seconds(axes: Axes, lines: Sequence[dict]) -> None:
    """What the wall time over all starts was spent on."""
    line: dict = next((line for line in reversed(lines) if "seconds/total" in line), {})
    total = line.get("seconds/total", 0.0)
    kinds = [name for name in line if name.startswith("seconds/") and name != "seconds/total"]
    if not total:
        return
    shares = [line[name] / total for name in kinds]
    bars = axes.barh(range(len(kinds)), shares, color=[COLOURS[0] if "productive" in n else GREY for n in kinds])
    axes.bar_label(bars, [f"{share:.1%}" for share in shares], padding=4, font=font(0.8 * TEXT), color=BLACK)
    axes.set_yticks(range(len(kinds)), [name.removeprefix("seconds/") for name in kinds])
    axes.set_xlim(0, max(shares) * 1.2)
    axes.invert_yaxis()
    axes.set_xlabel(f"share of {total / 3600:.2f} h" if total > 3600 else f"share of {total:.0f} s")
