"""SiT, DiT and LightningDiT in torch with the published tensor names, to compare against; for tests only.

Written from the published networks' description: facebookresearch/DiT models.py, willisma/SiT models.py,
hustvl/LightningDiT models/lightningdit.py, CVL-UESTC/Internal-Guidance SiT/models/sit.py and LightningDiT.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight


def norm(width, rms):
    return RMSNorm(width) if rms else nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


class Rope(nn.Module):
    """Tables as the published module computes them, in float32."""

    def __init__(self, head_width, side):
        super().__init__()
        half = head_width // 2
        frequencies = 1.0 / 10000 ** (torch.arange(0, half, 2).float() / half)
        angles = (torch.arange(side)[:, None] * frequencies).repeat_interleave(2, dim=-1)
        rows = angles[:, None, :].expand(side, side, half)
        table = torch.cat([rows, rows.transpose(0, 1)], dim=-1).reshape(side * side, head_width)
        self.register_buffer("freqs_cos", table.cos())
        self.register_buffer("freqs_sin", table.sin())

    def forward(self, x):
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        return x * self.freqs_cos + turned * self.freqs_sin


class Attention(nn.Module):
    def __init__(self, width, heads, qk_norm, rms):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        make = (RMSNorm if rms else nn.LayerNorm) if qk_norm else (lambda _: nn.Identity())
        self.q_norm, self.k_norm = make(width // heads), make(width // heads)

    def forward(self, x, rope):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rope(q), rope(k)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGlu(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


def modulate(x, shift, scale):
    x = x * (1 + scale[:, None])
    return x if shift is None else x + shift[:, None]


class Block(nn.Module):
    def __init__(self, width, heads, mlp_ratio, qk_norm, rms, swiglu, shift):
        super().__init__()
        self.norm1, self.norm2 = norm(width, rms), norm(width, rms)
        self.attn = Attention(width, heads, qk_norm, rms)
        hidden = int(width * mlp_ratio)
        self.mlp = SwiGlu(width, int(2 / 3 * hidden)) if swiglu else Mlp(width, hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, (6 if shift else 4) * width))
        self.shift = shift

    def forward(self, x, cond, rope):
        modulation = self.adaLN_modulation(cond)
        if self.shift:
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
        else:
            shift1 = shift2 = None
            scale1, gate1, scale2, gate2 = modulation.chunk(4, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class Head(nn.Module):
    def __init__(self, width, outputs, rms):
        super().__init__()
        self.norm_final = norm(width, rms)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, cond):
        shift, scale = self.adaLN_modulation(cond).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class Network(nn.Module):
    """One of golden/variants.VARIANTS; `head` is the depth of the intermediate head, 0 for none."""

    def __init__(
        self,
        *,
        code,
        size,
        patch,
        channels,
        width=48,
        depth=3,
        heads=4,
        classes=10,
        mlp_ratio=4.0,
        head=0,
        learn_sigma=False,
        qk_norm=False,
        rms=False,
        swiglu=False,
        rope=False,
        shift=True,
    ):
        super().__init__()
        self.patch, self.side, self.head_depth = patch, size // patch, head
        self.drops_sigma = learn_sigma and code != "dit"
        self.outputs = channels * (2 if learn_sigma else 1)
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(channels, width, patch, stride=patch)
        self.t_embedder = nn.Module()
        self.t_embedder.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder = nn.Module()
        self.y_embedder.embedding_table = nn.Embedding(classes + 1, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.side**2, width), requires_grad=False)
        self.feat_rope = Rope(width // heads, self.side) if rope else None
        self.blocks = nn.ModuleList([Block(width, heads, mlp_ratio, qk_norm, rms, swiglu, shift) for _ in range(depth)])
        if head:
            self.final_layer_xr = Head(width, patch**2 * self.outputs, rms)
        self.final_layer = Head(width, patch**2 * self.outputs, rms)

    def forward(self, x, t, y):
        """(final, intermediate or None), each (B, C, H, W); DiT's final has 2C channels."""
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(128, dtype=torch.float32) / 128)
        angles = (t.float()[:, None] * frequencies[None]).to(x.dtype)
        cond = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))
        cond = cond + self.y_embedder.embedding_table(y)
        h = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        intermediate = None
        for i, block in enumerate(self.blocks):
            h = block(h, cond, self.feat_rope)
            if i + 1 == self.head_depth:
                intermediate = self.image(self.final_layer_xr(h, cond))
        return self.image(self.final_layer(h, cond)), intermediate

    def image(self, tokens):
        batch, p, side = len(tokens), self.patch, self.side
        x = tokens.view(batch, side, side, p, p, self.outputs).permute(0, 5, 1, 3, 2, 4)
        x = x.reshape(batch, self.outputs, side * p, side * p)
        return x.chunk(2, dim=1)[0] if self.drops_sigma else x
