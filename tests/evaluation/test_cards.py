"""Reproduction cards: their commands parse, their page is current, and their judgement says what was measured."""

import importlib
import json
import re
import shlex

import pytest
import toy

from ig_jax.base import cli
from ig_jax.diffusion.presets import PRESETS
from ig_jax.evaluation import cards


@pytest.mark.parametrize("name", cards.CARDS)
def test_the_commands_of_a_card_parse(name, monkeypatch):
    monkeypatch.chdir(toy.ROOT)
    for command in cards.CARDS[name].commands():
        _, _, module, *arguments = shlex.split(command)
        module = importlib.import_module(module)
        monkeypatch.setattr("sys.argv", [module.__name__, *arguments])
        cli.parse(toy.fresh(module.FLAGS))
        if hasattr(module.FLAGS, "experiment"):
            e = module.FLAGS.experiment()
            assert e.run.steps == cards.CARDS[name].steps and len(e.loss.inter_weight) == len(e.model.inter_depth)


def test_a_card_of_a_preset_has_its_fid():
    for card in cards.CARDS.values():
        for flag in card.sampling:
            if flag.startswith("--preset=") and card.labels == "random" and card.steps in (4_000_000, 3_400_000):
                assert PRESETS[flag.removeprefix("--preset=")].fid == card.fid


def test_the_page_of_cards_is_the_table_of_the_command():
    page = (toy.ROOT / "ig_jax" / "evaluation" / "README.md").read_text()
    assert cards.table() in page


@pytest.mark.parametrize(
    "fid, count, verdict",
    [(1.44, 50_000, "reproduced"), (1.52, 50_000, "not reproduced"), (1.46, 9, "not judged"), (None, 9, "not judged")],
)
def test_a_number_is_judged_within_the_tolerance(fid, count, verdict):
    assert cards.CARDS["sit-xl-ig-cfg"].judge({"fid": fid, "count": count}).startswith(f"{verdict}:")


def test_what_a_card_needs_is_named_where_it_cannot_run(monkeypatch, capsys):
    from ig_jax import evaluate

    monkeypatch.setattr("sys.argv", ["evaluate", "--card=sit-xl-ig", "--checkpoint=runs/none"])
    cli.run(evaluate.main, toy.fresh(evaluate.FLAGS), evaluate.__doc__)
    assert re.search(r"not run here: give --reference, --inception, --out", capsys.readouterr().out)
    monkeypatch.setattr("sys.argv", ["evaluate", "--card=sit-xxl"])
    with pytest.raises(SystemExit):
        cli.run(evaluate.main, toy.fresh(evaluate.FLAGS), evaluate.__doc__)
    assert "--card='sit-xxl' must be all, or one of sit-b" in capsys.readouterr().err


def test_a_card_samples_as_it_says_and_is_judged(monkeypatch, tmp_path, capsys):
    from ig_jax import evaluate

    seen = {}

    def score(out, by):
        seen.update({key: evaluate.FLAGS[key].value for key in ("preset", "labels", "num")})
        out.mkdir()
        (out / "metrics.json").write_text(json.dumps({"fid": 1.2, "count": 100}))

    monkeypatch.setattr(evaluate, "score", score)
    given = ["--card=lightningdit-ig-balanced", "--checkpoint=a", "--reference=b", "--inception=c", "--num=100"]
    monkeypatch.setattr("sys.argv", ["evaluate", *given, f"--out={tmp_path / 'out'}"])
    cli.run(evaluate.main, toy.fresh(evaluate.FLAGS), evaluate.__doc__)
    assert seen == {"preset": "lightningdit-ig", "labels": "balanced", "num": 100}
    assert json.loads((tmp_path / "out" / "card.json").read_text())["verdict"].startswith("not judged: 100 samples")
