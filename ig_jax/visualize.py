"""Draw pictures of guidance: the same noise under several settings, and what internal guidance extrapolates along.

  python -m ig_jax.visualize compare --checkpoint=runs/digits --out=runs/digits/compare --ig_scale=2 --cfg_scale=1.25
  python -m ig_jax.visualize map --checkpoint=runs/digits --out=runs/digits/map --scales='ig:1,1.5,2;cfg:1,1.25'
  python -m ig_jax.visualize gap --checkpoint=runs/digits --out=runs/digits/gap --num=4
  python -m ig_jax.visualize run --workdir=runs/digits

compare  compare.png: no guidance, CFG, IG and both, one class in each row; and the images of each as an npz archive.
map      map.png: images over the scales of two guidances, one class in each row of a cell.
gap      gap.png: |D_f - D_i|, where the two heads disagree about the denoised image, along the sampling trajectory.
run      WORKDIR/run.png: the loss, what guidance rests on by noise level, norms by depth, and where the time went.
Every setting starts from the same noise. recipe.json, next to the picture, records what it shows.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from ig_jax.base import cli
from ig_jax.base.errors import check
from ig_jax.base.files import run_path
from ig_jax.base.progress import Progress
from ig_jax.diffusion.guidance import RULES
from ig_jax.diffusion.recipe import Recipe
from ig_jax.generation import captions, decode, trajectories
from ig_jax.generation.captions import strength
from ig_jax.generation.flags import Request, define_request, requested
from ig_jax.generation.pretrained import Pretrained
from ig_jax.parallel import processes
from ig_jax.pictures import images, plots
from ig_jax.pictures import run as run_picture
from ig_jax.training.workdir import read_metrics

WORDS = ("compare", "map", "gap", "run")
SMALL = 32  # pixels: the side of images of which many are shown
# Classes and images of each: of small images, and of large ones.
SHOWN = {"compare": ((10, 8), (4, 2)), "map": ((10, 4), (4, 1)), "gap": ((4, 1), (4, 1))}
UPPER = "Upper rows: the image that the final head denoises to. "
GAP = (
    "Colours: how far the denoised images of the two heads are apart, averaged over channels. Curves: the root mean "
    "square of this difference, of each sample (light) and of all. Columns and axis: sigma, from noise (1) to data (0)."
)

FLAGS = flags.FlagValues()
define_request(FLAGS, None, "Images of each recipe; by default a few of each of up to 10 classes.")
SCALES = flags.DEFINE_string(
    "scales", "ig:1,1.5,2;cfg:1,1.25", "map: two guidances and their scales.", flag_values=FLAGS
)

WORKDIR = flags.DEFINE_string("workdir", None, "run: the directory of a training run.", flag_values=FLAGS)
RUN = (
    "Over the steps: every term of the loss. By noise level and depth: means over quarters of the run, from light to "
    "dark. Where the cosine is positive, the gap between the heads points to the data; the nearest guidance scale is "
    "the w at which D_i + w (D_f - D_i) has the least error."
)


def main(word: str) -> None:
    processes.check_alone("visualize")
    if word == "run":
        return draw_run(run_path(cli.required(WORKDIR), "workdir"))
    more = {"scales": SCALES.value if word == "map" else None}
    request = requested(FLAGS, word, ["png"], functools.partial(shown, word), **more)
    folder = request.folder
    folder.check_same(request.metadata, request.labels)
    if word != "gap":
        request.model.check_images()
    draw = {"compare": compare, "map": guidance_map, "gap": gap}[word]
    print(request.model.summary(request.recipe), flush=True)
    draw(request, folder.path)
    folder.write_metadata(request.metadata)
    print(f"wrote {folder.path / word}.png")


def draw_run(workdir: Path) -> None:
    """Write run.png.  Raises: UserError for a directory without metrics."""
    lines = read_metrics(workdir)
    check(bool(lines), "--workdir", str(workdir), "the directory of a training run, with a metrics.jsonl")
    images.write_png(
        workdir / "run.png", run_picture.picture(lines, f"{workdir.name}, {lines[-1]['step']} steps. {RUN}")
    )
    print(f"wrote {workdir / 'run.png'}")


def shown(word: str, model: Pretrained) -> tuple[int, str]:
    """How many images a picture shows by default, and of which labels."""
    classes, each = SHOWN[word][model.image_shape[0] > SMALL]
    number = model.experiment.model.num_classes
    if number <= classes:
        return number * each, "balanced"
    spread = np.linspace(0, number - 1, classes).round().astype(int)
    return classes * each, ",".join(map(str, spread))


def images_of(request: Request, recipes: list[Recipe]) -> list[np.ndarray]:
    """Images uint8 (N, H, W, C) of each recipe, all from the same noise, sorted by label."""
    model, labels = request.model, request.labels.tolist()
    order = np.argsort(request.labels, kind="stable")
    for recipe in recipes:
        model.check(recipe)
    with Progress(len(recipes) * len(labels), "images") as progress:
        given: dict[str, Any] = dict(seed=request.seed, batch_size=request.batch_size, progress=progress)
        return [model.sample(labels, recipe, **given)[order] for recipe in recipes]


def by_class(request: Request) -> tuple[list[str], int]:
    """(names of the classes shown, images of each).  Raises: UserError for unequal numbers of images."""
    classes, counts = np.unique(request.labels, return_counts=True)
    expected = f"as many images of each of the {len(classes)} labels"
    fix = "use --labels=balanced and a multiple of the classes"
    check(len(set(counts)) == 1, "num", len(request.labels), expected, fix)
    return [request.model.class_name(label) for label in classes], int(counts[0])


def variants(recipe: Recipe) -> dict[str, Recipe]:
    """No guidance, CFG, IG and both, by title.  Raises: UserError when one of the two is off."""
    ig, cfg = recipe.rules["ig"], recipe.rules["cfg"]
    scales, fix = (ig.scale, cfg.scale), "give --ig_scale and --cfg_scale"
    check(not ig.off and not cfg.off, "(ig_scale, cfg_scale)", scales, "two scales other than 1 to compare", fix)
    s, w = f"s = {strength(cfg)}", f"w = {strength(ig)}"
    return {
        "no guidance": recipe.replace(ig_scale=1.0, cfg_scale=1.0),
        f"CFG\n{s}": recipe.replace(ig_scale=1.0),
        f"IG\n{w}": recipe.replace(cfg_scale=1.0),
        f"IG + CFG\n{w}\n{s}": recipe,
    }


def compare(request: Request, out: Path) -> None:
    """Write compare.png and one archive for each variant, one class in each row."""
    asked, (names, each) = variants(request.recipe), by_class(request)
    panels = dict(zip(asked, images_of(request, list(asked.values()))))
    others = captions.guidance(request.recipe, without=("ig", "cfg"), nothing="")

    def drawn(titles: list[str], caption: str) -> plots.Table:
        rows = range(0, len(names) * each, each)
        return plots.table(
            [[panels[title][row : row + each] for title in titles] for row in rows],
            columns=titles,
            rows=names,
            across=each,
            group=len(names),
            caption=caption,
        )

    titles, caption = list(panels), captions.of_metadata(request.metadata, others)
    whole = drawn(titles, caption)
    bands = [whole] if whole.page.width <= plots.WIDEST else [drawn(titles[:2], ""), drawn(titles[2:], caption)]
    images.write_png(out / "compare.png", plots.stacked([band.page.pixels() for band in bands]))
    for title, panel in panels.items():
        name = title.split("\n")[0].lower().replace(" + ", "_").replace(" ", "_")
        images.write_npz(out / f"{name}.npz", panel, np.sort(request.labels))


def parse_axes(text: str) -> dict[str, list[float]]:
    """ "ig:1,1.5,2;cfg:1,1.25" -> the scales of the columns and of the rows by guidance.  Raises: UserError."""
    parts = [part.partition(":") for part in text.split(";")]
    try:
        axes = {name: [float(scale) for scale in scales.split(",")] for name, _, scales in parts}
    except ValueError:
        axes = {}
    expected = f"two of {', '.join(RULES)} with scales, such as ig:1,1.5,2;cfg:1,1.25"
    check(len(parts) == len(axes) == 2 and axes.keys() <= RULES.keys(), "--scales", text, expected)
    return axes


def guidance_map(request: Request, out: Path) -> None:
    """Write map.png: for each pair of scales the images, a class in each row, and how far they are from the first."""
    (across, columns), (down, rows) = parse_axes(SCALES.value).items()
    names, each = by_class(request)
    recipes = [request.recipe.replace(**{f"{across}_scale": c, f"{down}_scale": r}) for r in rows for c in columns]
    found = images_of(request, recipes)
    changes = [f"{np.abs(cell.astype(float) - found[0]).mean() / 255:.2%}" for cell in found]
    lines, wide = range(0, len(found), len(columns)), len(columns)
    others = captions.guidance(request.recipe, without=(across, down), nothing="")
    legend = f"Rows of a cell: class {', '.join(names)}. Number: mean change of the pixels from the first cell.\n"
    drawn = plots.table(
        [found[start : start + wide] for start in lines],
        columns=[f"{across.upper()} {strength(recipe.rules[across])}" for recipe in recipes[:wide]],
        rows=[f"{down.upper()} {strength(recipe.rules[down])}" for recipe in recipes[::wide]],
        notes=[changes[start : start + wide] for start in lines],
        across=each,
        caption=legend + captions.of_metadata(request.metadata, others),
    )
    images.write_png(out / "map.png", drawn.page.pixels())


def gap(request: Request, out: Path) -> None:
    """Write gap.png: the denoised images and where the heads differ, above the curve of the difference."""
    model, e = request.model, request.model.experiment
    program, scales = model.program(request.recipe), request.recipe.scales
    found = trajectories.follow(program, model.params, scales, request.labels, request.seed, trajectories.STOPS)
    decodable = model.autoencoder is not None or not decode.needs_autoencoder(e.latents)
    picture = plots.gap(
        np.stack([model.to_images(denoised) for denoised in found.final]) if decodable else None,
        np.abs(found.difference).mean(-1),
        found.norm,
        found.sigma,
        names=[model.class_name(label) for label in request.labels],
        caption=f"{UPPER if decodable else ''}{GAP}\n{captions.of_metadata(request.metadata)}",
    )
    images.write_png(out / "gap.png", picture)


if __name__ == "__main__":
    cli.run(main, FLAGS, __doc__, WORDS)
