"""The evaluate command with Inception: folders, archives, checkpoints, written references, resuming."""

import json
import sys
from types import SimpleNamespace

import inception_files as files
import jax
import jax.numpy as jnp
import numpy as np
import object_store
import pytest
import tiny_checkpoint as tiny
import toy
from PIL import Image

from ig_jax import evaluate
from ig_jax.base import buckets, cli
from ig_jax.base.copies import local_copy
from ig_jax.checkpoints import inception as checkpoint
from ig_jax.config.experiment import EmaConfig
from ig_jax.data import crop
from ig_jax.evaluation import features, rows, scoring, while_training
from ig_jax.evaluation.frechet import frechet_distance
from ig_jax.evaluation.reference import SIZES
from ig_jax.generation import pretrained
from ig_jax.generation.labels import labels_for
from ig_jax.models import inception
from ig_jax.parallel.mesh import make_mesh
from ig_jax.parallel.sharding import replicated

COUNT = 24
KEYS = [*scoring.KEYS, "count", "reference_count", "recipe"]


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    cli.run(evaluate.main, toy.fresh(evaluate.FLAGS), evaluate.__doc__)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The network, samples as a folder, reference images as an npz; all of 8 x 8 pixels, so that one program serves."""
    place = tmp_path_factory.mktemp("place")
    (place / "in").mkdir()
    checkpoint.save(place / "in", files.params(), {})
    rng = np.random.default_rng(0)
    samples = rng.integers(0, 256, (COUNT, 8, 8, 3), dtype=np.uint8)
    (place / "samples").mkdir()
    for i, image in enumerate(samples):
        Image.fromarray(image).save(place / "samples" / f"{i:06d}.png")
    reference = rng.integers(0, 200, (8, 8, 8, 3), dtype=np.uint8)
    np.savez(place / "ref.npz", reference)
    return place, samples, reference


@pytest.fixture(autouse=True)
def one_program(monkeypatch):
    """Every network of this module is one compiled program."""
    build = features.InceptionNet.__init__

    def shared(self, directory, mesh):
        if directory not in NETS:
            build(self, directory, mesh)
            NETS[directory] = dict(vars(self))
        vars(self).update(NETS[directory])

    monkeypatch.setattr(features.InceptionNet, "__init__", shared)


NETS: dict = {}


@pytest.fixture
def quick(monkeypatch):
    """Random projections as features and a distance without eigenvalues, for tests of what is around them."""
    sizes = SIZES | {"logits": inception.CLASSES}

    def forward(params, images):
        pixels = jnp.broadcast_to(images, (*images.shape[:3], 3)).reshape(len(images), -1) / 255
        return {name: pixels @ jax.random.normal(jax.random.key(0), (pixels.shape[1], n)) for name, n in sizes.items()}

    def build(net, directory, mesh):
        compiled = jax.jit(forward, out_shardings=replicated(mesh))
        vars(net).update(mesh=mesh, digest="quick", _params={}, _forward=compiled)

    distance = lambda a, cov_a, b, cov_b: float(((a - b) ** 2).sum() + abs(np.trace(cov_a) - np.trace(cov_b)))
    monkeypatch.setattr(features.InceptionNet, "__init__", build)
    monkeypatch.setattr(scoring, "frechet_distance", distance)


@pytest.fixture(scope="module")
def exact(place):
    """Features of samples and reference by the network itself."""
    return [jax.jit(inception.forward)(files.params(), images) for images in place[1:]]


def flags(place, out):
    given = {"samples": place / "samples", "reference": place / "ref.npz", "inception": place / "in", "out": out}
    return [f"--{name}={value}" for name, value in given.items()] + ["--batch_size=8"]


def test_metrics_of_a_folder_are_those_of_its_features(place, exact, tmp_path, monkeypatch, capsys):
    run(monkeypatch, *flags(place[0], tmp_path))
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert list(found) == KEYS and (found["count"], found["reference_count"]) == (COUNT, 8)
    for key, name in (("fid", "pool"), ("sfid", "spatial")):
        a, b = (np.asarray(getattr(one, name), np.float64) for one in exact)
        wanted = frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
        assert found[key] == pytest.approx(wanted, rel=1e-4)
    a, b = (np.asarray(one.pool) for one in exact)
    assert [found["precision"], found["recall"]] == list(rows.precision_recall(a, b))
    assert [found["kid"], found["kid_std"]] == pytest.approx(list(rows.kernel_distance(a, b, size=8)), rel=1e-3)
    recipe = found["recipe"]
    assert recipe["inception"] == checkpoint.digest(files.params())
    assert {note["name"] for note in recipe["warnings"]} == {"no_recipe", "small_subsets", "rank_deficient"}
    assert "warning: rank_deficient" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_samples_reference_and_numbers_may_lie_in_a_bucket(place, quick, tmp_path, monkeypatch, capsys):
    run(monkeypatch, *flags(place[0], tmp_path / "out"))
    with object_store.google(tmp_path / "cache") as url:
        for name in ("samples", "ref.npz"):
            buckets.put(place[0] / name, f"{url}/{name}")
        given = [f"--samples={url}/samples", f"--reference={url}/ref.npz", f"--out={url}/out"]
        run(monkeypatch, *flags(place[0], ""), *given)
        copy = local_copy(f"{url}/out")
        assert [path.name for path in copy.iterdir()] == ["metrics.json"]
        here, there = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path / "out", copy))
        assert [there[key] for key in KEYS[:-1]] == [here[key] for key in KEYS[:-1]]
        with pytest.raises(SystemExit):
            run(monkeypatch, *flags(place[0], ""), *given, f"--samples={url}/ref.npz")
        assert "without the numbers of other samples" in capsys.readouterr().err


def test_a_killed_evaluation_resumes_and_gives_the_same_number(place, quick, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "PART", 8)
    measured, forward = [], features.InceptionNet.__call__
    run(monkeypatch, *flags(place[0], tmp_path / "whole"))

    def counted(net, images):
        measured.append(len(images))
        if len(measured) == 3:
            raise RuntimeError("killed")
        return forward(net, images)

    monkeypatch.setattr(features.InceptionNet, "__call__", counted)
    with pytest.raises(RuntimeError):
        run(monkeypatch, *flags(place[0], tmp_path / "out"))
    stored = sorted(path.name for path in (tmp_path / "out" / "features").iterdir())
    assert stored == ["00000000.npz", "what.json"]
    run(monkeypatch, *flags(place[0], tmp_path / "out"))
    assert sum(measured[3:]) == COUNT - 8 + 8
    texts = [(tmp_path / name / "metrics.json").read_text() for name in ("whole", "out")]
    assert texts[0] == texts[1]


def test_a_checkpoint_is_measured_without_files_and_against_a_written_reference(place, tmp_path, monkeypatch, capsys):
    e = tiny.experiment()
    directory, net = tiny.write(tmp_path / "run", e), f"--inception={place[0] / 'in'}"
    reference = tmp_path / "written.npz"
    run(monkeypatch, f"--write_reference={reference}", f"--images={place[0] / 'ref.npz'}", net, "--batch_size=8")
    given = f"--checkpoint={directory}", net, "--num=12", "--seed=3", "--ig_scale=2", "--labels=random"
    out = tmp_path / "out"
    run(monkeypatch, *given, f"--reference={reference}", f"--out={out}", "--batch_size=8")
    found = json.loads((out / "metrics.json").read_text())
    metadata = found["recipe"]["samples"]["recipe"]
    assert (found["count"], found["reference_count"]) == (12, 8) and found["sfid"] > 0 and found["kid"] is not None
    assert (metadata["seed"], metadata["labels"], metadata["recipe"]["ig_scale"]) == (3, "random", 2.0)
    assert [path.name for path in out.iterdir()] == ["metrics.json"]
    assert while_training_fid(e, directory, reference, place, tmp_path, monkeypatch) == pytest.approx(
        found["fid"], rel=1e-4
    )
    with pytest.raises(SystemExit):
        run(monkeypatch, *given, f"--reference={reference}", f"--out={out}", "--batch_size=8", "--seed=4")
    assert "must be a directory without the numbers of other samples" in capsys.readouterr().err
    # Statistics alone, as of EDM: what needs rows or spatial features cannot be had.
    with np.load(reference) as stored:
        np.savez(tmp_path / "edm.npz", mu=stored["mu"], sigma=stored["sigma"])
    run(monkeypatch, *given, f"--reference={tmp_path / 'edm.npz'}", f"--out={tmp_path / 'b'}", "--batch_size=4")
    other = json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert [key for key in KEYS if other[key] is None] == [
        *("sfid", "inception_score_std", "precision", "recall", "kid", "kid_std", "mind", "reference_count")
    ]
    assert other["fid"] == pytest.approx(found["fid"], rel=1e-4)  # another batch size


def while_training_fid(e, directory, reference, place, tmp_path, monkeypatch) -> float:
    """What the hook of a run with these weights writes, for the samples of the command above."""
    monkeypatch.setattr(while_training, "BATCH", 8)
    monkeypatch.setattr(while_training, "labels_for", lambda *a: labels_for(a[0], "random", *a[2:]))
    asked = dict(evaluate_every=1, evaluate_samples=12, inception=str(place[0] / "in"), reference=str(reference))
    e = toy.replace(e, seed=3, run=toy.replace(e.run, **asked), sample=e.sample.replace(ig_scale=2.0))
    (hook,) = while_training.hooks(e, make_mesh(), tmp_path)
    written, ema = {}, {e.ema.names[0]: pretrained.load(directory).params}
    records = SimpleNamespace(write=lambda step, values: written.update(values))
    hook.action(SimpleNamespace(step=0, state=SimpleNamespace(ema=ema), records=records))
    return written["fid_12"]


def test_checkpoints_of_a_pattern_are_one_table_the_lowest_fid_first(tmp_path, monkeypatch, capsys):
    measured_by = set()

    def score(out, by):
        measured_by.add(by)
        out.mkdir(parents=True)
        numbers = {"fid": 1 / int(out.name), "sfid": None, "inception_score": 2.0}
        (out / "metrics.json").write_text(json.dumps(numbers))
        assert evaluate.FLAGS.checkpoint == str(tmp_path / "run" / out.name)

    monkeypatch.setattr(evaluate, "score", score)
    for step in ("5", "20", "9.orbax-checkpoint-tmp"):
        (tmp_path / "run" / step).mkdir(parents=True)
    run(monkeypatch, f"--checkpoint={tmp_path}/run/*", "--inception=in", "--reference=ref", f"--out={tmp_path / 'out'}")
    assert len(measured_by) == 1  # whose reference is measured once
    lines = (tmp_path / "out" / "table.txt").read_text().splitlines()
    assert [line.split()[:2] for line in lines] == [["checkpoint", "FID"], ['"20"', "0.050"], ['"5"', "0.200"]]
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize(
    "change, says",
    [
        ({"--inception": "/nowhere"}, "inception.safetensors"),
        ({"--inception": ""}, "--inception is missing"),
        ({"--reference": "/nowhere.npz"}, "--reference="),
        ({"--samples": "/nowhere"}, "--samples="),
        ({"--num": "7"}, "--num=7"),
        ({"--checkpoint": "/nowhere"}, "(--samples, --checkpoint)"),
    ],
)
def test_bad_input_is_one_line(change, says, place, tmp_path, monkeypatch, capsys):
    given = dict(flag.split("=", 1) for flag in flags(place[0], tmp_path / "out")) | change
    with pytest.raises(SystemExit) as leaves:
        run(monkeypatch, *(f"{name}={value}" for name, value in given.items() if value))
    error = capsys.readouterr().err
    assert leaves.value.code == 2 and says in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_reference_of_another_network_is_refused(place, tmp_path, monkeypatch, capsys):
    with np.load(place[0] / "ref.npz") as stored:
        arrays = {"arr_0": stored["arr_0"], "recipe": np.array(json.dumps({"inception": "ab", "size": [64, 64]}))}
    np.savez(tmp_path / "ref.npz", **arrays)
    with pytest.raises(SystemExit):
        run(monkeypatch, *flags(place[0], tmp_path / "out"), f"--reference={tmp_path / 'ref.npz'}")
    assert "inception='ab' must be" in capsys.readouterr().err


def test_a_sweep_searches_a_grid_then_around_its_best_and_resumes(place, quick, tmp_path, monkeypatch, capsys):
    directory, out = tiny.write(tmp_path / "run", tiny.experiment()), tmp_path / "out"
    given = [f"--checkpoint={directory}", f"--inception={place[0] / 'in'}", "--num=8", "--batch_size=8"]
    given += [f"--reference={place[0] / 'ref.npz'}", f"--out={out}", "--sweep=ig_scale=1,2;cfg_scale=1,1.5"]
    run(monkeypatch, *given)
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    points = {(row["point"]["ig_scale"], row["point"]["cfg_scale"]): row["fid"] for row in rows}
    best = min(points, key=points.get)
    assert {(w, s) for w in (1, 2) for s in (1, 1.5)} <= points.keys() and len(points) == len(rows) == 7
    assert {(1.5, s) for s in (1, 1.25, 1.5)} & points.keys()
    stored = json.loads((out / "best.json").read_text())
    assert tuple(stored["point"].values()) == best
    printed = capsys.readouterr().out
    assert printed.endswith((out / "table.txt").read_text()) and (out / "sweep.png").stat().st_size > 1000
    assert len(list(out.glob("events.out.tfevents.*"))) == 1
    monkeypatch.setattr(scoring, "measure", lambda *a: pytest.fail("measured again") if "point" in a[4] else None)
    monkeypatch.setattr(scoring, "completed", lambda reference, *a: reference)
    run(monkeypatch, *given)
    with pytest.raises(SystemExit):
        run(monkeypatch, *given, "--sweep=ig_scale=1,1")
    assert "--sweep='ig_scale=1,1' must be axes" in capsys.readouterr().err


def test_a_sweep_over_intervals_and_averages(place, tmp_path, monkeypatch):
    """A point samples with its own interval and average; the best ones stay where a scale is refined."""
    e = toy.replace(tiny.experiment(), ema=EmaConfig((0.9, 0.5), warmup=False))
    seen = []

    def measure(net, batches, count, folder, what):
        folder.mkdir()
        model, recipe = batches.args[:2]
        rule = recipe.rules["ig"]
        seen.append((rule.scale, rule.interval, model.ema, model.params is models[model.ema].params))
        mean = 3.0 - (model.ema == "0.5") - (rule.interval == (0.3, 1.0)) + abs(rule.scale - 1.6)
        return SimpleNamespace(in_order=SimpleNamespace(mean=mean))

    models, load = {}, pretrained.load

    def loaded(*args, **options):
        model = load(*args, **options)
        models[model.ema] = model
        return model

    monkeypatch.setattr(pretrained, "load", loaded)
    monkeypatch.setattr(scoring, "measure", measure)
    monkeypatch.setattr(scoring, "completed", lambda reference, *a: reference)
    monkeypatch.setattr(scoring, "distances", lambda found, reference: {"fid": found.in_order.mean, "sfid": None})
    given = [f"--checkpoint={tiny.write(tmp_path / 'run', e)}", f"--inception={place[0] / 'in'}", "--num=8"]
    given += [f"--reference={place[0] / 'ref.npz'}", f"--out={tmp_path / 'out'}"]
    run(monkeypatch, *given, "--sweep=ig_scale=1,2;ig_interval=0:1,0.3:1;ema=0.9,0.5")
    intervals = ((0.0, 1.0), (0.3, 1.0))
    assert set(seen[:8]) == {
        (w, interval, ema, True) for w in (1, 2) for interval in intervals for ema in ("0.9", "0.5")
    }
    assert seen[8:] == [(1.5, (0.3, 1.0), "0.5", True)]
    best = json.loads((tmp_path / "out" / "best.json").read_text())["point"]
    assert best == {"ig_scale": 1.5, "ig_interval": [0.3, 1.0], "ema": "0.5"}


def test_a_reference_of_class_folders_holds_their_crops(place, tmp_path, monkeypatch):
    rng, expected = np.random.default_rng(1), []
    for index, shape in enumerate([(20, 9, 3), (8, 13, 3), (8, 8, 3), (31, 16, 3)]):
        path = tmp_path / "images" / f"class{index // 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        image.save(path)
        expected.append(np.asarray(crop.centre_crop(image, 8)))
    given = f"--images={tmp_path / 'images'}", "--size=8", f"--inception={place[0] / 'in'}", "--batch_size=8"
    run(monkeypatch, f"--write_reference={tmp_path / 'ref.npz'}", *given)
    with np.load(tmp_path / "ref.npz") as written:
        np.testing.assert_array_equal(written["arr_0"], expected)
        pool = jax.jit(inception.forward)(files.params(), np.stack(2 * expected))[0]  # 8 images, as the reference
        np.testing.assert_allclose(written["mu"], np.mean(pool, 0), rtol=1e-4)
