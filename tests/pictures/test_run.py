"""The picture of a run: from the metrics of any run, those of an older version included."""

import json

import numpy as np
from refusal import refused

from ig_jax import visualize
from ig_jax.pictures import run

BLUE = np.array([31, 95, 191])
LINES = [
    {
        "step": step,
        "loss/final": 1 / step,
        **{
            f"sigma/{name}": {"0.05": 0.5, "0.15": None} for name in ("final", "intermediate", "gap", "cosine", "scale")
        },
        "gradient": {"time_embed": 1.0, "0": 2.0},
        "seconds/productive": 8.0,
        "seconds/down": 2.0,
        "seconds/total": 10.0,
    }
    for step in (1, 2)
]


def drawn(picture, row, column):
    """How many blue pixels a panel has: those of the last quarter of the run, or of productive time."""
    left, top = run.LEFT + column * (run.WIDTH + run.ACROSS), run.TOP + row * (run.HEIGHT + run.DOWN)
    panel = picture[top : top + run.HEIGHT, left : left + run.WIDTH].astype(int)
    return int((np.abs(panel - BLUE).max(-1) < 10).sum())


def test_a_run_has_a_picture_and_a_folder_without_metrics_none(tmp_path, capsys):
    with refused("--workdir", str(tmp_path), expected="metrics.jsonl"):
        visualize.draw_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in LINES) + '{"step": 3, "lo')
    visualize.draw_run(tmp_path)
    assert "run.png" in capsys.readouterr().out and (tmp_path / "run.png").stat().st_size > 10_000
    picture = run.picture(LINES, "caption")
    assert [[drawn(picture, i, j) > 0 for j in range(3)] for i in range(3)] == [
        [True] * 3,
        [True] * 3,
        [False, False, True],
    ]
    idle = run.picture([line | {"seconds/productive": 2.0, "seconds/down": 8.0} for line in LINES], "caption")
    assert drawn(idle, 2, 2) < drawn(picture, 2, 2) / 3


def test_values_that_are_all_left_out_leave_an_empty_panel():
    far = {"sigma/scale": {"0.05": 3000.0}}  # of heads that agree yet
    assert drawn(run.picture([LINES[0] | far | {"held_out/final": 0.5}], "caption"), 1, 1) < 20  # the legend


def test_a_run_of_a_version_without_curves_has_its_losses():
    picture = run.picture([{"step": 1, "loss/total": 2.0}], "caption")
    assert drawn(picture, 0, 0) > 0 and drawn(picture, 0, 1) == drawn(picture, 2, 2) == 0
