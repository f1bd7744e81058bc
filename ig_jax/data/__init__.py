"""Labelled images and latents: formats, sources, batches."""
