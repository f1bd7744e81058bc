"""Make weights_*.pt with the real torch.save, and weights_expected.json with what they hold.

Run: python tests/golden/make_weight_files.py    (torch 2.13.0 made the files in this folder)
"""

import argparse
import json
from collections import OrderedDict
from pathlib import Path

import torch

FOLDER = Path(__file__).parent


def weights(seed: int) -> OrderedDict:
    """A state dict with every storage form that a published file was seen to have."""
    torch.manual_seed(seed)
    shared = torch.randn(24)
    state = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3)).state_dict()  # has _metadata
    state["parameter"] = torch.nn.Parameter(torch.randn(2, 5))
    state["transposed"] = torch.randn(3, 4, 2).permute(2, 0, 1)
    state["shared.head"] = shared[:8].view(2, 4)
    state["shared.tail"] = shared[8:].view(4, 4)[:, 1:3]
    state["expanded"] = torch.randn(3).expand(2, 3)
    state["half"] = torch.randn(5).half()
    state["brain"] = torch.randn(2, 3).bfloat16()
    state["double"] = torch.randn(3).double()
    state["long"] = torch.tensor([-(2**60), 0, 3])
    state["int"] = torch.arange(4, dtype=torch.int32).view(2, 2)
    state["short"] = torch.tensor([-300, 300], dtype=torch.int16)
    state["char"] = torch.tensor([-100, 100], dtype=torch.int8)
    state["byte"] = torch.tensor([0, 255], dtype=torch.uint8)
    state["unsigned"] = torch.tensor([1, 65535], dtype=torch.uint16)
    state["bool"] = torch.tensor([True, False, True])
    state["scalar"] = torch.tensor(7)
    state["empty"] = torch.zeros(0, 3)
    tagged = torch.randn(2)
    tagged.note = "an attribute"  # saved through _rebuild_from_type_v2
    state["tagged"] = tagged
    return state


def described(state: dict) -> dict:
    """The dtype, shape and exact values of each tensor."""
    return {
        name: {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape), "values": t.tolist()}
        for name, t in state.items()
    }


def main() -> None:
    linear = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=1e-4)
    linear(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    raw, average = weights(0), weights(1)
    args = argparse.Namespace(
        model="SiT-XL/2", encoder_depth=8, cfg_scale=1.35, betas=(0.9, 0.95), legacy=False, ckpt=None, seed=2**40
    )
    config = {"model": {"model_type": "LightningDiT-XL/1"}, "train": {"lr": 2e-4}, "names": ["a", "b"]}

    torch.save(
        {"model": raw, "ema": average, "opt": optimizer.state_dict(), "args": args, "epoch": 3, "steps": 1000},
        FOLDER / "weights_sit.pt",
    )
    prefixed = {f"module.{name}": tensor for name, tensor in raw.items()}
    torch.save(
        {"model": prefixed, "ema": average, "opt": optimizer.state_dict(), "config": config},
        FOLDER / "weights_lightningdit.pt",
    )
    torch.save(raw, FOLDER / "weights_bare.pt")
    torch.save({"w": torch.arange(6.0).view(2, 3)}, FOLDER / "weights_old.pt", _use_new_zipfile_serialization=False)

    expected = {
        "raw": described(raw),
        "average": described(average),
        "args": {**vars(args), "betas": list(args.betas)},
        "config": config,
    }
    (FOLDER / "weights_expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
