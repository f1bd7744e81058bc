"""The same step and the same sampler with diffusers' DiTTransformer2DModel in PyTorch, as a worker runs them.

Everything torch does best is on: fused AdamW, foreach clipping and EMA, autocast with cached casts for
bfloat16, TF32 for float32 on a GPU as JAX has it, no copies between host and device. The model has one
output head where ours has two, and a label table in every block. It imports no JAX.
"""

import contextlib
import importlib.metadata
import resource
import sys

from ig_jax.benchmarking.timing import cores
from ig_jax.errors import UserError

NEEDS = ("torch", "diffusers")


def check_installed() -> None:
    """Raise UserError unless the peer can be imported."""
    for name in NEEDS:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(f"--peer=diffusers needs {name}, which is not installed; "
                            'python -m pip install -e ".[torch]"') from None


class _Peer:
    """A model, its device and its precision, from the numbers of a case (see `numbers`)."""

    def __init__(self, numbers: dict, compiled: bool):
        import torch
        from diffusers import DiTTransformer2DModel

        self.torch, self.numbers = torch, numbers
        torch.set_num_threads(cores())
        torch.set_float32_matmul_precision("high")
        torch.manual_seed(0)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = DiTTransformer2DModel(**numbers["model"]).to(self.device).eval()  # eval: labels dropped by us
        for parameter in self.model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
        self.forward = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.report = {
            "hardware": {"platform": "gpu" if self.device.type == "cuda" else "cpu",
                         "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"},
            "parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "versions": {name: importlib.metadata.version(name) for name in NEEDS},
            "threads": torch.get_num_threads(), "flops": numbers["flops"], "evaluations": numbers["evaluations"],
        }

    def predict(self, x, t, y):
        """The model's output [B, C, H, W] for latents, times in [0, 1] and labels."""
        return self.forward(x, timestep=t, class_labels=y, return_dict=False)[0]

    def autocast(self):
        """A context in which products are bfloat16 where the case says so."""
        if self.numbers["dtype"] == "float32":
            return contextlib.nullcontext()
        return self.torch.autocast(self.device.type, dtype=self.torch.bfloat16)

    def noise(self, *shape):
        return self.torch.randn(*shape, device=self.device)

    def wait(self) -> None:
        """Return when the device has done what it was given."""
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()

    def finish(self) -> dict:
        unit = 1 if sys.platform == "darwin" else 1024
        on_gpu = self.device.type == "cuda"
        device = self.torch.cuda.max_memory_allocated() if on_gpu else None
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {"memory": {"device": device, "program": None, "process": resident}}


class Train(_Peer):
    """Noise, label drop, one head's loss, backward, clipping, AdamW, EMA."""

    def __init__(self, numbers: dict, compiled: bool):
        super().__init__(numbers, compiled)
        torch, o = self.torch, numbers["optimizer"]
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=o["learning_rate"], betas=(o["b1"], o["b2"]), eps=o["eps"],
            weight_decay=o["weight_decay"], fused=True,
        )
        self.x = self.noise(*numbers["shape"])
        self.y = torch.arange(len(self.x), device=self.device) % numbers["null_label"]

    def run(self, calls: int) -> None:
        for _ in range(calls):
            self._step()
        self.wait()

    def _step(self) -> None:
        torch, n = self.torch, self.numbers
        eps, t = torch.randn_like(self.x), torch.rand(len(self.x), device=self.device)
        dropped = torch.rand(len(self.x), device=self.device) < n["label_drop"]
        y = torch.where(dropped, n["null_label"], self.y)
        at = t[:, None, None, None]
        with self.autocast():
            prediction = self.predict((1 - at) * self.x + at * eps, t, y)
        self.loss = torch.nn.functional.mse_loss(prediction.float(), eps - self.x)
        self.loss.backward()
        if n["optimizer"]["clip_norm"]:
            torch.nn.utils.clip_grad_norm_(self.parameters, n["optimizer"]["clip_norm"], foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - n["ema"])

    def finish(self) -> dict:
        return {**super().finish(), "loss": self.loss.item()}


class Sample(_Peer):
    """The Euler-Maruyama rows of our solver, the batch doubled by the null label where CFG is on."""

    def __init__(self, numbers: dict, compiled: bool):
        super().__init__(numbers, compiled)
        self.y = self.torch.arange(numbers["shape"][0], device=self.device) % numbers["null_label"]

    def run(self, calls: int) -> None:
        # Parameters keep requires_grad and one autocast spans the loop: only so are their casts cached.
        with self.torch.no_grad(), self.autocast():
            for _ in range(calls):
                self.latents = self._draw()
        self.wait()

    def _draw(self):
        torch, n = self.torch, self.numbers
        x, null = self.noise(*n["shape"]), torch.full_like(self.y, n["null_label"])
        for row in n["rows"]:
            t = torch.full((len(x),), row["t"], device=self.device)
            if row["cfg"]:
                both = self.predict(torch.cat([x, x]), torch.cat([t, t]), torch.cat([self.y, null])).float()
                conditional, unconditional = both.chunk(2)
                v = unconditional + n["cfg_scale"] * (conditional - unconditional)
            else:
                v = self.predict(x, t, self.y).float()
            x = row["x"] * x + row["v"] * v
            if row["noise"]:
                x = x + row["noise"] * torch.randn_like(x)
        return x

    def finish(self) -> dict:
        return {**super().finish(), "finite": bool(self.torch.isfinite(self.latents).all())}


MAKERS = {"train": Train, "sample": Sample}
