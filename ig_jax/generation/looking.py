"""Pictures to judge guidance by: the same noise under several settings, and what guidance pushes along."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ig_jax.diffusion import paths, samplers
from ig_jax.diffusion.guidance import blend, is_off
from ig_jax.diffusion.randomness import Purpose
from ig_jax.errors import UserError, check
from ig_jax.generation import drawing, images
from ig_jax.generation.generate import Program, normal
from ig_jax.generation.recipe import GUIDANCES, Recipe

Draw = Callable[[Recipe], np.ndarray]  # the images uint8 [N, H, W, C] of one recipe, always on the same noise
STOPS = 10  # sigma-times at which the gap is shown


def variants(recipe: Recipe) -> dict[str, Recipe]:
    """none / CFG / IG / IG + CFG by title.  Raises: UserError when one of the two is off."""
    check(not is_off(recipe.ig_scale) and not is_off(recipe.cfg_scale), "(ig_scale, cfg_scale)",
          (recipe.ig_scale, recipe.cfg_scale), "two scales other than 1 to compare",
          "give --ig_scale and --cfg_scale")
    return {
        "none\nplain model": dataclasses.replace(recipe, ig_scale=1.0, cfg_scale=1.0),
        f"CFG\ns {recipe.cfg_scale}": dataclasses.replace(recipe, ig_scale=1.0),
        f"IG\nw {recipe.ig_scale}": dataclasses.replace(recipe, cfg_scale=1.0),
        f"IG + CFG\nw {recipe.ig_scale}, s {recipe.cfg_scale}": recipe,
    }


def compare(draw: Draw, recipe: Recipe, labels: np.ndarray, class_names: Sequence[str], caption: str,
            ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(picture uint8 [h, w, 3], panels by title) of the four variants, one class a row."""
    classes, counts = np.unique(labels, return_counts=True)
    check(len(set(counts)) == 1, "num", len(labels),
          f"as many images of each of the {len(classes)} labels drawn",
          "use --labels=balanced and a multiple of the classes")
    order = np.argsort(labels, kind="stable")
    panels = {title: draw(variant)[order] for title, variant in variants(recipe).items()}
    return images.comparison(panels, row_labels=[class_names[c] for c in classes], caption=caption), panels


class Axes(NamedTuple):
    """Two guidances and their scales."""

    columns: tuple[str, list[float]]
    rows: tuple[str, list[float]]


def parse_axes(text: str) -> Axes:
    """"ig:1,1.5,2;cfg:1,1.25" -> the scales along the columns and along the rows.  Raises: UserError."""
    try:
        axes = [(name, [float(v) for v in values.split(",")])
                for name, _, values in (part.partition(":") for part in text.split(";"))]
        (first, _), (second, _) = axes
        known = first in GUIDANCES and second in GUIDANCES and first != second
    except ValueError:
        known = False
    if not known:
        raise UserError(f"map={text!r} must be two of {', '.join(GUIDANCES)} with scales, such as "
                        "ig:1,1.5,2;cfg:1,1.25")
    return Axes(*axes)


def map_recipes(recipe: Recipe, axes: Axes) -> list[list[Recipe]]:
    """The recipe at each place of the map, row by row."""
    (across, columns), (down, rows) = axes
    return [[dataclasses.replace(recipe, **{f"{across}_scale": c, f"{down}_scale": r}) for c in columns]
            for r in rows]


def guidance_map(draw: Draw, recipe: Recipe, axes: Axes, caption: str) -> np.ndarray:
    """A picture uint8 [h, w, 3] with one cell of images for each pair of scales, all on the same noise."""
    cells = [[_cell(draw(place)) for place in row] for row in map_recipes(recipe, axes)]
    (across, columns), (down, rows) = axes
    return drawing.table(
        cells, columns=[f"{across.upper()} {scale:g}" for scale in columns],
        rows=[f"{down.upper()} {scale:g}" for scale in rows], caption=caption,
    )


def _cell(batch: np.ndarray) -> np.ndarray:
    zoom = images.comfortable_zoom(batch.shape[1])
    return images.grid(batch, columns=int(np.ceil(np.sqrt(len(batch)))), zoom=zoom, gap=max(2, zoom // 2))


class Gap(NamedTuple):
    """What the two heads disagree about along a trajectory, S sigma-times from noise to data."""

    sigma: np.ndarray  # [S]
    denoised: np.ndarray  # D_f [S, N, H, W, C] float32
    difference: np.ndarray  # D_f - D_i, the same shape

    @property
    def norm(self) -> np.ndarray:
        """[S, N]: root mean square of the difference."""
        return np.sqrt(np.mean(np.square(self.difference), axis=(2, 3, 4)))


def gap_along(program: Program, params: dict[str, jax.Array], scales, labels: np.ndarray, seed: int) -> Gap:
    """The gap of the heads on the guided trajectories of samples 0 .. N - 1, at STOPS times of the grid.

    Raises: UserError for a model without a head, and for a solver that carries more than the latents.
    """
    check(len(program.model.inter_depth) > 0, "gap", True, "left out for a model without an intermediate head")
    probe = np.zeros(1)
    carries_latents = hasattr(program.solver, "rows") and program.solver.start(probe) is probe
    check(carries_latents and program.weak is None, "gap", True,
          "asked of a solver with a fixed grid and no memory, without autoguidance",
          "use euler, heun, trapezoid or sde")
    check(program.process.kind != "gaussian", "gap", True, "left out for the chain of DiT")
    rows = program.solver.rows(program.process.kind, program.steps)
    stops = np.unique(np.linspace(0, len(rows) - 1, STOPS).round().astype(int))
    denoised, difference = jax.jit(functools.partial(_gap_along, program, rows, stops.tolist()))(
        params, scales, jnp.asarray(labels), jnp.uint32(seed))
    return Gap(np.array([rows[i].lookup[0] for i in stops]), np.asarray(denoised), np.asarray(difference))


def _gap_along(program: Program, rows, stops, params, scales, labels, seed):
    indices = jnp.arange(len(labels), dtype=jnp.int32)
    velocity = program.field(params, {}, labels, scales)
    x = normal(seed, Purpose.SAMPLE_NOISE, indices, program.shape)
    seen = []
    for first, last in zip(stops, [*stops[1:], None]):
        seen.append(_denoised(program, params, x, rows[first].lookup[0], labels))
        if last is not None:
            x = samplers.integrate(
                program.solver, rows[first:last], velocity, x, region=program.guidance.region, first=first,
                noise=lambda step: normal(seed, Purpose.SAMPLE_INCREMENT, indices, program.shape, step),
            )
    finals, differences = zip(*seen)
    return jnp.stack(finals), jnp.stack(differences)


def _denoised(program: Program, params, x, t, labels):
    """(D_f, D_f - D_i) [N, H, W, C] float32 at sigma-time t."""
    times = jnp.full(labels.shape, t, jnp.float32)
    out = program.network(program.model, params)(x, times, labels)
    final, weak = (paths.convert(program.process.kind, "velocity", "data", v, x, times)
                   for v in (out.final, blend(out.intermediate, program.guidance.head)))
    return final, final - weak


def gap_picture(
    gap: Gap, decode: Callable[[np.ndarray], np.ndarray] | None, names: Sequence[str], caption: str
) -> np.ndarray:
    """For each sample what the final head denoises to and where the heads differ, above the curve of the
    norm.
    """
    heat = np.abs(gap.difference).mean(-1)
    cells, rows = [], []
    for n, name in enumerate(names):
        if decode is not None:
            cells.append([_enlarged(image) for image in decode(gap.denoised[:, n])])
            rows.append(name)
        cells.append([_enlarged(drawing.heat(picture, heat.max())) for picture in heat[:, n]])
        rows.append("gap" if decode is not None else name)
    legend = "top: D_f, what the final head denoises to; gap: " if decode is not None else ""
    pictures = drawing.table(cells, columns=[f"{s:.2f}" for s in gap.sigma], rows=rows, corner="sigma",
                             caption=f"{legend}|D_f - D_i|, dark is none")
    curve = drawing.curve(gap.sigma, gap.norm.mean(1), x_title="sigma", title="rms of D_f - D_i",
                          caption=caption, width=pictures.shape[1])
    return np.concatenate([pictures, curve])


def _enlarged(image: np.ndarray) -> np.ndarray:
    return images.grid(image[None], columns=1, zoom=max(1, round(1.5 * images.COMFORTABLE / image.shape[0])))
