"""A hook of the training loop that measures samples of the first average: FID, or FD-CNN on small images."""

import dataclasses
import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from ig_jax.config.experiment import Experiment
from ig_jax.evaluation import classifier, scoring, sweep
from ig_jax.evaluation.features import InceptionNet
from ig_jax.evaluation.reference import read_reference
from ig_jax.generation import decode
from ig_jax.generation.labels import labels_for
from ig_jax.generation.pretrained import Pretrained
from ig_jax.parallel import processes
from ig_jax.training.hooks import Hook, Moment

BATCH = 64  # images that Inception sees at once
SMALL = 32  # pixels of the sides of images that the small CNN can tell apart

Measure = Callable[[Pretrained, np.ndarray, int], dict[str, float]]  # model, labels, step -> numbers by name


def hooks(e: Experiment, mesh: Mesh, directory: Path) -> list[Hook]:
    """The hook of a run, where its config asks for one and can be followed.

    Raises: UserError for an Inception or a reference that cannot be used, before the first step.
    """
    small = e.latents.name == "pixels" and e.model.input_size <= SMALL
    if not (e.run.evaluate_every and e.run.evaluate_samples and (e.run.inception or small)):
        return []
    folder, name = directory / "evaluation", e.ema.names[0]
    measure = _fid(e, mesh, folder) if e.run.inception else _fd_cnn(e, folder)
    found = decode.load_autoencoder(e.run.autoencoder, e.latents) if e.run.autoencoder else None
    decode.check_decodable(e.latents, found)
    labels = labels_for(np.arange(e.run.evaluate_samples), "balanced", e.model.num_classes, e.seed)

    def evaluate(moment: Moment) -> None:
        model = Pretrained(e, moment.state.ema[name], mesh, moment.step, name, "", (), found)
        moment.records.write(moment.step, measure(model, labels, moment.step))

    return [Hook(e.run.evaluate_every, evaluate, patience=1000, spends="evaluation")]


def _fid(e: Experiment, mesh: Mesh, folder: Path) -> Measure:
    """FID and Inception Score, as `evaluate` measures them."""
    net = InceptionNet(e.run.inception, mesh)
    reference = read_reference(e.run.reference, "run.reference")
    reference = scoring.completed(reference, net, BATCH, folder / "reference")
    reference = dataclasses.replace(reference, images=None, rows=None)
    count = rounded(e.run.evaluate_samples)

    def measure(model: Pretrained, labels: np.ndarray, step: int) -> dict[str, float]:
        batches = functools.partial(scoring.sampled, model, model.recipe, labels, e.seed, BATCH)
        found = scoring.measure(net, batches, len(labels), folder / "features", {"step": step})
        fid = scoring.distances(found, reference)["fid"]
        processes.wait_for_all("the samples are measured")
        if processes.is_first():
            shutil.rmtree(folder / "features")
        numbers = {f"fid_{count}": fid, f"inception_score_{count}": found.in_order.mean}
        return {key: value for key, value in numbers.items() if value is not None}

    return measure


def _fd_cnn(e: Experiment, folder: Path) -> Measure:
    """FD-CNN and class agreement, by a classifier that `evaluate --out` of that folder shares."""
    train, test = (e.open_split(split) for split in (e.data.split, e.data.test_split))
    folder.mkdir(exist_ok=True)
    evaluator = sweep.Evaluator.of(classifier.trained_once(train, test, folder), train, test)
    count = rounded(e.run.evaluate_samples)

    def measure(model: Pretrained, labels: np.ndarray, step: int) -> dict[str, float]:
        batches = model.images(model.recipe, labels.tolist(), seed=e.seed, batch_size=min(500, len(labels)))
        row = evaluator.score(((images, labels[rows]) for rows, images in batches), len(labels), len(labels))
        return {f"fd_cnn_{count}": row["fd_cnn"], f"agreement_{count}": row["agreement"]}

    return measure


def rounded(count: int) -> str:
    """10k for 10,000, as in FID-10K."""
    return f"{count // 1000}k" if count % 1000 == 0 else str(count)
