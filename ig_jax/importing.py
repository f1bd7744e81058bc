"""A planned import carried out: a published file's tensors into a checkpoint directory.

Tensors come one at a time: beside the parameters themselves little memory is needed.
"""

import dataclasses
import importlib.metadata
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ig_jax.config import Experiment, bind
from ig_jax.errors import UserError
from ig_jax.interop import autoencoder_checkpoint, autoencoder_weights, plans, published
from ig_jax.interop.experiment import experiment
from ig_jax.models.latents import SD_VAE_SCALING, LatentScaling, from_mean_std
from ig_jax.progress import Progress
from ig_jax.training import checkpoints as ckpt

PACKAGES = ("ig_jax", "jax", "flax", "orbax-checkpoint", "numpy")
BUFFERS = "buffers"  # item of the published constants that the network computes for itself


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A SiT, DiT or LightningDiT file on its way to a checkpoint."""

    plan: plans.Denoiser
    experiment: Experiment

    @classmethod
    def of(cls, plan: plans.Denoiser) -> "Denoiser":
        """The import with its experiment.  Raises: UserError where what the file says of itself cannot be."""
        latents = latent_scaling(plan).to_json()
        return cls(plan, bind(Experiment, experiment(
            plan.name, plan.family, plan.model, latents, plan.said, plan.ema_decay)))

    def read(self) -> dict[str, dict[str, jax.Array]]:
        """The items of the checkpoint, the file read one tensor at a time.  Raises: UserError for damage."""
        tensors = self.plan.tensors
        # The network computes its own tables, but not to the last bit as torch does: kept for the way back.
        buffers = {name: jnp.asarray(tensors[name].read()) for name in published.ROPE_BUFFERS if name in tensors}
        published.check_rope_buffers(buffers, self.plan.model)
        params = self._read_params()
        return {f"ema_{self.experiment.ema.names[0]}": params} | ({BUFFERS: buffers} if buffers else {})

    def _read_params(self) -> dict[str, jax.Array]:
        model, params, read_bytes = self.plan.model, {}, 0
        state = {name: tensor.read for name, tensor in self.plan.tensors.items()}
        total = len(published.parameter_shapes(model))
        with Progress(total, "tensors", stream=sys.stderr) as progress:
            for name, array in published.read_params(state, model):
                array = np.asarray(array, np.float32, order="C")
                if not np.isfinite(array).all():
                    theirs = published.published_name(name, model)
                    raise UserError(f"{self.plan.file}: tensor {theirs} holds values that are not finite; "
                                    "take a checkpoint from before training diverged")
                params[name] = jnp.asarray(array)
                read_bytes += array.nbytes
                progress.advance()
                if len(params) % -(-total // 4) == 0 or len(params) == total:
                    progress.show(f"{read_bytes / 1e6:,.0f} MB read")
        return params

    def write(self, directory: Path, items: dict[str, dict[str, jax.Array]]) -> None:
        """The items as the one step of a work directory.  Raises: UserError when it cannot be written."""
        e, file = self.experiment, self.plan.file
        dtypes = {name: str(t.dtype) for name, t in self.plan.tensors.items() if t.dtype != np.float32}
        meta = {
            "config": e.as_dict(),
            "data": {},
            "labels": [str(i) for i in range(e.model.num_classes)],
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            "devices": jax.device_count(),
            "source": {"file": file.name, "bytes": file.stat().st_size, "dtypes": dtypes},
        }
        ckpt.write_step(directory / "checkpoints", self.plan.said.step, items, meta)
        (directory / "config.json").write_text(json.dumps(e.as_dict(), indent=2) + "\n")


def latent_scaling(plan: plans.Denoiser) -> LatentScaling:
    """The scaling of the plan's latents.  Raises: UserError for a std that is not positive."""
    latents, channels = plan.latents, plan.model.channels
    if latents.mean is not None:
        return from_mean_std(latents.name, latents.mean, latents.std / plan.said.latent_multiplier, "half")
    if latents.name == SD_VAE_SCALING.name:
        return SD_VAE_SCALING
    return LatentScaling(latents.name, (0.0,) * channels, (1.0,) * channels, "half")


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """An SD-VAE or VA-VAE file on its way to a directory of its own."""

    plan: plans.Autoencoder

    def read(self) -> dict:
        """The parameter tree.  Raises: UserError for damaged tensors."""
        return autoencoder_weights.to_params(self.plan.tensors, self.plan.config)

    def write(self, directory: Path, params: dict) -> None:
        """The autoencoder's directory.  Raises: UserError when it cannot be written."""
        autoencoder_checkpoint.save(directory, self.plan.config, params, self.plan.naming)


def prepare(plan: plans.Denoiser | plans.Autoencoder) -> Denoiser | Autoencoder:
    """The import that carries the plan out: first `read` from the open file, then `write`.  Raises: UserError."""
    return Autoencoder(plan) if isinstance(plan, plans.Autoencoder) else Denoiser.of(plan)
