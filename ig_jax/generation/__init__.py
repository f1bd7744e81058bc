"""Sampling from a checkpoint."""
