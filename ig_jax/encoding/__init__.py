"""Images to latents."""
