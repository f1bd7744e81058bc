"""Versions of installed packages, for the metadata written next to results."""

import importlib.metadata

PACKAGES = ("ig_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """The version of each package by name; "unknown" where it is not installed."""
    return {name: version(name) for name in packages}


def version(name: str) -> str:
    """The version of one package; "unknown" where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
