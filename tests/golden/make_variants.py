"""Make variants.npz and variants.json from torch_networks.Network with the weights and inputs of variants.py.

The first holds its outputs in float64, the second the names and shapes of its state dicts.

Run: python tests/golden/make_variants.py    (torch 2.13.0 made the file in this folder)
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent / "interop")]
from torch_networks import Network  # noqa: E402
from variants import VARIANTS, inputs, weight  # noqa: E402


def main() -> None:
    arrays, keys = {}, {}
    for name, settings in VARIANTS.items():
        network = Network(**settings)
        network.load_state_dict(
            {
                key: value if key.startswith("feat_rope") else torch.from_numpy(weight(key, tuple(value.shape)))
                for key, value in network.state_dict().items()
            }
        )
        keys[name] = {key: list(value.shape) for key, value in network.state_dict().items()}
        x, t, y = (torch.from_numpy(array) for array in inputs(name))
        with torch.no_grad():
            final, intermediate = network.double()(x.double(), t, y)
            single = network.float()(x, t, y)[0]
        arrays[f"{name}/final"] = final.float().numpy()
        if intermediate is not None:
            arrays[f"{name}/intermediate"] = intermediate.float().numpy()
        print(f"{name:<20} spread {final.std():.3f}, float32 off by {(single - final).abs().max():.1e}")
    (FOLDER / "variants.json").write_text(json.dumps(keys, separators=(",", ":")) + "\n")
    np.savez_compressed(FOLDER / "variants.npz", **arrays)


if __name__ == "__main__":
    main()
