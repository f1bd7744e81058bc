"""Names and shapes of the published files in full size, denoisers and autoencoders."""

import json
from pathlib import Path

FOLDER = Path(__file__).parent
KEYS = json.loads((FOLDER / "published_keys.json").read_text())  # of denoisers, one block for all
AUTOENCODERS = json.loads((FOLDER / "autoencoder_keys.json").read_text())


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of the published file `name`, a key of one of the two."""
    if name in AUTOENCODERS:
        found = AUTOENCODERS[name]
    else:
        entry = KEYS[name]
        blocks = {f"blocks.{i}.{k}": v for i in range(entry["depth"]) for k, v in entry["block"].items()}
        found = entry["rest"] | blocks
    return {key: tuple(shape) for key, shape in found.items()}
