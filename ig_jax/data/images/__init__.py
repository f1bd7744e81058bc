"""Forms in which images lie on a disk."""
