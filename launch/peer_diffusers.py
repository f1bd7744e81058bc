"""The train step and the sampler of a case in PyTorch, with diffusers' DiTTransformer2DModel, for the benchmark.

  python -m ig_jax.benchmark train --model=SiT-S/2 --peer="python launch/peer_diffusers.py [--compile]"

The fast paths of PyTorch are on: fused AdamW, foreach clipping and EMA, autocast with cached casts for bfloat16, TF32
for float32 on a GPU as in JAX, no copies between host and device. The model has one output head where the one of
ig_jax has two, and a label table in every block. Needs the extra torch.
"""

import contextlib
import os
import resource
import sys
from typing import Any

try:
    import torch
    from diffusers import DiTTransformer2DModel
except ModuleNotFoundError as error:
    torch, MISSING = None, str(error)

from ig_jax.base.errors import check
from ig_jax.base.versions import versions
from ig_jax.benchmarking.cases import Case
from ig_jax.benchmarking.worker import serve
from ig_jax.config.experiment import Experiment
from ig_jax.models import cost

# What diffusers' network has, of the fields of ours.
PARTS = {"norm": "layernorm", "mlp": "gelu", "rope": False, "qk_norm": "none", "adaln_shift": True, "mlp_ratio": 4.0}


def check_same(e: Experiment) -> None:
    """Raise UserError unless diffusers has the parts of an experiment."""
    same = all(getattr(e.model, part) == value for part, value in PARTS.items()) and e.process.kind == "linear"
    check(same, "--peer", "diffusers", f"left out for {e.name}", "it has the parts of SiT alone: try --model=SiT-S/2")


class _Peer:
    """A model, its device and its precision; latents are (B, C, H, W)."""

    def __init__(self, values: dict[str, Any]):
        case = Case.of(values)
        self.e, model = case.experiment, case.experiment.model
        check_same(self.e)
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.set_float32_matmul_precision("high")
        torch.manual_seed(0)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network: Any = DiTTransformer2DModel
        self.model = network(
            num_attention_heads=model.num_heads,
            attention_head_dim=model.width // model.num_heads,
            in_channels=model.channels,
            out_channels=model.channels,
            num_layers=model.depth,
            sample_size=model.input_size,
            patch_size=model.patch_size,
            num_embeds_ada_norm=model.num_classes,
        )
        self.model.to(self.device).eval()  # eval: run() drops the labels
        for parameter in self.model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
        self.forward = torch.compile(self.model, dynamic=False) if "--compile" in sys.argv else self.model
        self.shape = (case.batch, model.channels, model.input_size, model.input_size)
        self.y = torch.arange(case.batch, device=self.device) % model.num_classes
        on_gpu = self.device.type == "cuda"
        name = torch.cuda.get_device_name() if on_gpu else "cpu"
        self.report = {
            "hardware": {"platform": "gpu" if on_gpu else "cpu", "device": name},
            "parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "versions": versions(("torch", "diffusers")),
        }

    def flops(self, evaluations: float) -> float:
        """FLOPs of so many forward passes of a batch, which have one output head."""
        model = self.e.model
        macs = cost.forward_macs(model) - len(model.inter_depth) * cost.head_macs(model)
        return 2 * macs * evaluations * len(self.y)

    def predict(self, x, t, y):
        """The model's output (B, C, H, W) for latents (B, C, H, W), times (B,) in [0, 1] and labels (B,)."""
        return self.forward(x, timestep=t, class_labels=y, return_dict=False)[0]

    def autocast(self):
        """A context in which matrix products are bfloat16 where the case asks for it."""
        if self.e.model.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def noise(self, *shape):
        return torch.randn(*shape, device=self.device)

    def wait(self) -> None:
        """Return when the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def finish(self) -> dict[str, Any]:
        """Peak bytes on the device, or of the process on a CPU."""
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"peak_bytes": torch.cuda.max_memory_allocated() if self.device.type == "cuda" else resident}


class Train(_Peer):
    """Noise, label drop, one head's loss, backward, clipping, AdamW, EMA."""

    def __init__(self, values: dict[str, Any]):
        super().__init__(values)
        o = self.e.optimizer
        check(o.name == "adamw", "optimizer.name", o.name, "adamw with this peer")
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=o.learning_rate, betas=(o.b1, o.b2), eps=o.eps, weight_decay=o.weight_decay, fused=True
        )
        self.x = self.noise(*self.shape)
        self.report |= {"flops": self.flops(3)}

    def run(self, calls: int) -> None:
        for _ in range(calls):
            self._step()
        self.wait()

    def _step(self) -> None:
        eps, t = torch.randn_like(self.x), torch.rand(len(self.x), device=self.device)
        dropped = torch.rand(len(self.x), device=self.device) < self.e.loss.label_drop
        y = torch.where(dropped, self.e.model.num_classes, self.y)
        at = t[:, None, None, None]
        with self.autocast():
            prediction = self.predict((1 - at) * self.x + at * eps, t, y)
        self.loss = torch.nn.functional.mse_loss(prediction.float(), eps - self.x)
        self.loss.backward()
        if self.e.optimizer.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.e.optimizer.clip_norm, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - self.e.ema.decays[0])

    def finish(self) -> dict:
        return {**super().finish(), "loss": self.loss.item()}


class Sample(_Peer):
    """Euler-Maruyama over the rows of our solver, with the null label in a doubled batch where CFG is on."""

    def __init__(self, values: dict[str, Any]):
        super().__init__(values)
        recipe, path = self.e.sample, self.e.process.kind
        solver: Any = recipe.solver
        check(solver.name == "sde", "--solver", solver.name, "sde with this peer")
        self.scale = float(recipe.rules["cfg"].scale)
        self.rows = [
            {"noise": 0.0} | row.coefficients | {"cfg": "cfg" in recipe.guidance.region(row.guided_at[0])}
            for row in solver.rows(path, recipe.steps)
        ]
        evaluations = sum(1 + row["cfg"] for row in self.rows)
        self.report |= {"evaluations": evaluations, "flops": self.flops(evaluations)}

    def run(self, calls: int) -> None:
        # Casts are cached only if parameters keep requires_grad and one autocast spans the loop.
        with torch.no_grad(), self.autocast():
            for _ in range(calls):
                self.latents = self._sample()
        self.wait()

    def _sample(self):
        x, null = self.noise(*self.shape), torch.full_like(self.y, self.e.model.num_classes)
        for row in self.rows:
            t = torch.full((len(x),), row["t"], device=self.device)
            if row["cfg"]:
                both = self.predict(torch.cat([x, x]), torch.cat([t, t]), torch.cat([self.y, null])).float()
                conditional, unconditional = both.chunk(2)
                v = unconditional + self.scale * (conditional - unconditional)
            else:
                v = self.predict(x, t, self.y).float()
            x = row["x"] * x + row["v"] * v
            if row["noise"]:
                x = x + row["noise"] * torch.randn_like(x)
        return x

    def finish(self) -> dict:
        return {**super().finish(), "finite": bool(torch.isfinite(self.latents).all())}


def make(name: str) -> type[_Peer]:
    """The program by its name in ig_jax.  Raises: UserError where torch or diffusers is missing."""
    fix = 'python -m pip install -e ".[torch]"'
    check(torch is not None, "--peer", "diffusers", f"left out: {'' if torch else MISSING}", fix)
    return {"Train": Train, "Sample": Sample}[name.split(":")[1]]


if __name__ == "__main__":
    serve(make)
