"""Versions of packages, installed or not."""

import jax

from ig_jax.base.versions import versions


def test_a_package_that_is_not_installed_is_unknown():
    assert versions(("jax", "no-such-package")) == {"jax": jax.__version__, "no-such-package": "unknown"}
    assert "ig_jax" in versions() and "unknown" not in versions(("jax", "numpy", "flax")).values()
