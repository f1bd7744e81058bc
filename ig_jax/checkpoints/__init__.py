"""Checkpoints and their digests."""
