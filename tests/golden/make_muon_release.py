"""Writes muon_release.npz: the release's Muon in torch, from its description, for one and three steps.

python make_muon_release.py      needs torch 2.13.0 (CPU); tensors in the published layout
"""

from pathlib import Path

import numpy as np
import torch

SHAPES = {
    "x_embedder.proj.weight": (8, 4, 2, 2),
    "pos_embed": (1, 4, 8),
    "y_embedder.embedding_table.weight": (11, 8),
    "t_embedder.mlp.2.weight": (8, 8),
    "blocks.0.attn.qkv.weight": (24, 8),
    "blocks.0.attn.qkv.bias": (24,),
    "blocks.0.mlp.fc2.weight": (8, 32),
    "final_layer.linear.weight": (16, 8),
    "final_layer.linear.bias": (16,),
}
RATE, DECAY, B1, B2, MOMENTUM = 2e-3, 0.01, 0.9, 0.95, 0.95


def orthogonalised(matrix):
    x = matrix.to(torch.bfloat16)
    tall = x.shape[0] > x.shape[1]
    x = x.t() if tall else x
    x = x / (torch.linalg.vector_norm(x) + 1e-7)
    for _ in range(5):
        gram = x @ x.t()
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    return (x.t() if tall else x).to(torch.float32)


def muon(p, gradient, average):
    flat = gradient.reshape(gradient.shape[0], -1)
    average.mul_(MOMENTUM).add_(flat, alpha=1 - MOMENTUM)
    update = orthogonalised((1 - MOMENTUM) * flat + MOMENTUM * average)
    update *= max(1, flat.shape[0] / flat.shape[1]) ** 0.5
    p *= 1 - RATE * DECAY
    p -= RATE * 0.2 * max(p.shape[:2]) ** 0.5 * update.reshape(p.shape)


def adam(p, gradient, m, v, t):
    m.mul_(B1).add_(gradient, alpha=1 - B1)
    v.mul_(B2).add_(gradient * gradient, alpha=1 - B2)
    p -= RATE * (m / (1 - B1**t)) / ((v / (1 - B2**t)).sqrt() + 1e-8)


def main():
    rng = np.random.default_rng(0)
    draw = lambda shape, scale: (scale * rng.standard_normal(shape)).astype(np.float16)
    start = {name: draw(shape, 1.0) for name, shape in SHAPES.items()}
    # The fixed positions get no gradient, which the release replaces by zeros.
    gradients = [{name: draw(s, 0.1) for name, s in SHAPES.items() if name != "pos_embed"} for _ in range(3)]
    out = {f"start/{name}": array for name, array in start.items()}
    params = {name: torch.tensor(array.astype(np.float32)) for name, array in start.items()}
    state = {name: [torch.zeros_like(p) for _ in range(2)] for name, p in params.items()}
    for t, given in enumerate(gradients, 1):
        out |= {f"gradient{t}/{name}": array for name, array in given.items()}
        for name, p in params.items():
            gradient = torch.tensor(given.get(name, np.zeros(p.shape)).astype(np.float32))
            if p.ndim >= 2:
                muon(p, gradient, state[name][0].view(p.shape[0], -1))
            else:
                adam(p, gradient, *state[name], t)
        if t != 2:
            out |= {f"after{t}/{name}": p.numpy().copy() for name, p in params.items()}
    np.savez_compressed(Path(__file__).with_name("muon_release.npz"), **out)


if __name__ == "__main__":
    main()
