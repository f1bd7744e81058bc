"""Features and logits by recipe, so that a case is a few numbers; the values are those of the published evaluators."""

import json
from pathlib import Path

import numpy as np

CASES = json.loads((Path(__file__).parent / "golden" / "metrics.json").read_text())


def features(dist: int, draw: int, n: int, d: int, shift: float, scale: float, repeat: int = 1) -> np.ndarray:
    """Rectified correlated normal rows, float32 (n repeat, d), the same bits everywhere."""
    p = np.random.RandomState(dist)
    m, s, c = 0.5 * p.random_sample(d) + shift, 0.2 + 0.6 * p.random_sample(d), 0.5 * p.random_sample(d) - 0.25
    z = np.random.RandomState(draw).standard_normal((n, d))
    return np.repeat((scale * np.maximum(m + s * z + c * np.roll(z, 1, axis=1), 0)).astype(np.float32), repeat, 0)


def logits(seed: int, n: int, c: int, peak: float, ordered: bool) -> np.ndarray:
    """Logits with one class raised, float32 (n, c), in the order of the classes where `ordered`."""
    r = np.random.RandomState(seed)
    y, x = r.randint(0, c, n), r.standard_normal((n, c))
    x[np.arange(n), y] += peak + r.standard_normal(n)
    return (x[np.argsort(y, kind="stable")] if ordered else x).astype(np.float32)
