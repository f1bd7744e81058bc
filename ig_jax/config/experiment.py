"""The sections of an experiment, checked in full before anything is compiled.

A config file returns an ml_collections.ConfigDict; `schema.bind` turns it into the frozen dataclasses below. Defaults
live in configs/ and config/published.py alone: a field with a default here is off, or decided by its reader.
"""

import dataclasses

from ig_jax.base.errors import UserError, check
from ig_jax.data.dataset import DataConfig, open_split
from ig_jax.data.sources import Source
from ig_jax.data.spec import BatchSpec, Encoder
from ig_jax.diffusion.loss import LossConfig
from ig_jax.diffusion.process import ProcessConfig
from ig_jax.diffusion.recipe import Recipe
from ig_jax.models.dit import DiTConfig
from ig_jax.models.latents import LatentScaling, autoencoder_name
from ig_jax.optim.ema import EmaConfig
from ig_jax.optim.optimizer import AdamWConfig, MuonConfig


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1.

    Attributes:
        data: copies of the state, each with a part of the batch.
        fsdp: devices that share one copy of the state.
        tensor: devices that share the matrices of a block.
        fsdp_up_to: where fsdp is 1: the largest divisor of the devices up to this.
        dcn_data: TPU slices or GPU boxes that only `data` goes over; 0 for the slices that JAX reports.
    """

    data: int
    fsdp: int
    tensor: int
    fsdp_up_to: int = 1
    dcn_data: int = 0


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How long, and what is written when. Durations in steps, 0 for never.

    Attributes:
        steps: of the whole run.
        log_every: steps between two lines of metrics.
        checkpoint_every: steps between two checkpoints.
        keep_checkpoints: how many of the newest stay.
        preview_every: steps between two previews.
        preview_images: in a preview.
        autoencoder: directory of the one that decodes previews of latents, and encodes images in the step.
        checkpoint_minutes: a checkpoint also so long after the last one, 0 for never.
        skip_limit: steps skipped in a row after which a run goes back to its last checkpoint, once.
        skip_leaps: also skip losses so many standard deviations above the recent ones; 0 for never.
        evaluate_every: steps between two measures of the loss on data.test_split and, where it can be done, of samples.
        evaluate_samples: measured by FID, or for images of at most 32 pixels without `inception` by FD-CNN; 0 for none.
        inception: directory of the InceptionV3 that `convert` wrote.
        reference: as --reference of `evaluate`.
        step_deadline: seconds after which a step counts as hung; 0 for 10 median steps, at least 120.
    """

    steps: int
    log_every: int
    checkpoint_every: int
    keep_checkpoints: int
    preview_every: int
    preview_images: int
    autoencoder: str = ""
    checkpoint_minutes: float = 15.0
    skip_limit: int = 10
    skip_leaps: float = 0.0
    evaluate_every: int = 0
    evaluate_samples: int = 10_000
    inception: str = ""
    reference: str = ""
    step_deadline: float = 0.0

    def __post_init__(self):
        for name in ("steps", "log_every", "checkpoint_every", "keep_checkpoints", "skip_limit"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        counts = ("preview_every", "preview_images", "evaluate_every", "evaluate_samples")
        for name in (*counts, "checkpoint_minutes", "skip_leaps", "step_deadline"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        given = bool(self.inception) == bool(self.reference)
        check(given, "(inception, reference)", (self.inception, self.reference), "given together")


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Where a new run gets its weights; a resumed run goes on from its own checkpoint instead.

    Attributes:
        checkpoint: workdir of another run, or one of its steps; "" for fresh weights.
        ema: which of its averages, by decay; "" for the first.
    """

    checkpoint: str
    ema: str

    def __post_init__(self):
        given = self.checkpoint or not self.ema
        check(given, "ema", self.ema, "empty without a checkpoint", "set --config.init.checkpoint")


@dataclasses.dataclass(frozen=True)
class Trained:
    """What sampling needs of an experiment.

    Attributes:
        name: of the run, in captions and results.
        model: the network.
        latents: how they are normalised; name "pixels" for a model of the images themselves.
        process: forward process, prediction and times.
        ema: averages of the weights.
        sample: recipe of previews, and the default of the sample command.
    """

    name: str
    model: DiTConfig
    latents: LatentScaling
    process: ProcessConfig
    ema: EmaConfig
    sample: Recipe

    def __post_init__(self):
        self.process.check_model(self.model)
        try:
            self.sample.check_model(self.model)
        except UserError as error:
            raise error.within("sample") from error

    def as_dict(self) -> dict:
        """Plain JSON types; bind(type(x), x.as_dict()) == x."""
        return dataclasses.asdict(self) | {"sample": self.sample.flat()}


@dataclasses.dataclass(frozen=True)
class Experiment(Trained):
    """Everything that defines a run.

    Attributes:
        seed: of everything random.
        init: where a new run gets its weights.
        loss: weights of its terms.
        optimizer: AdamW or Muon, by its name.
        data: where they are, and what a batch holds.
        mesh: devices along each axis.
        run: durations.
    """

    seed: int
    init: InitConfig
    loss: LossConfig
    optimizer: AdamWConfig | MuonConfig
    data: DataConfig
    mesh: MeshConfig
    run: RunConfig

    def __post_init__(self):
        check(0 <= self.seed < 2**31, "seed", self.seed, "in [0, 2^31)")
        self.loss.check_model(self.model, self.process)
        holds, of_pixels = self._promise.holds, self.latents.name == "pixels"
        check(holds == "pixels" or not of_pixels, "data.holds", holds, "pixels for latents.name='pixels'")
        if self.encodes:
            expected, fix = "the autoencoder that encodes the images", "set it, or encode them with ig_jax.encode"
            check(self.run.autoencoder != "", "run.autoencoder", "", expected, fix)
            expected, fix = "those of these latents, which images do not tell", "take those that ig_jax.encode measures"
            check(not self.latents.is_identity, "latents.scale", self.latents.scale, expected, fix)
        previews, expected = self.run.preview_images, "0 for a model of latents without an autoencoder"
        decodable = of_pixels or not previews or self.run.autoencoder != ""
        check(decodable, "run.preview_images", previews, expected, "set run.autoencoder")
        self.optimizer.check_model(self.model)
        super().__post_init__()

    @property
    def _promise(self) -> BatchSpec:
        """As `batch_spec`, without the autoencoder, whose directory a reader of the checkpoint may not have."""
        model = self.model
        shape = (model.input_size, model.input_size, model.channels)
        return self.data.spec(shape, self.latents, model.num_classes)

    @property
    def encodes(self) -> bool:
        """Whether images become latents in the step."""
        return self.latents.name != "pixels" and self._promise.holds == "pixels"

    @property
    def batch_spec(self) -> BatchSpec:
        """What the config promises of its batches without opening the data; an opened source must match it.

        Raises: UserError where images are to be encoded by an autoencoder that is not there, or of other latents.
        """
        if not self.encodes:
            return self._promise
        from ig_jax.checkpoints import autoencoder  # late: it brings Orbax

        directory, wanted = self.run.autoencoder, self.latents
        config = autoencoder.describe_directory(directory)[0]
        name = autoencoder_name(config.latent_channels, config.factor)
        expected = f"an autoencoder of {wanted.name} with {wanted.channels} channels, not of {name}"
        fits = (name, config.latent_channels) == (wanted.name, wanted.channels)
        check(fits, "config.run.autoencoder", directory, expected)
        encoder = Encoder(config, autoencoder.digest(directory), self.data.compute)
        return dataclasses.replace(self._promise, encoder=encoder)

    def open_split(self, split: str) -> Source:
        """The source of one split.  Raises: UserError where it is not what the config promises."""
        try:
            return open_split(self.data, split, self.batch_spec)
        except UserError as error:
            if not error.name.startswith(("data.", "model.")):  # a file or a record, no setting
                raise
            raise error.within("config") from error

    def of_data(self, spec: BatchSpec) -> "Experiment":
        """The experiment with what its data and latents sections leave to the data as `spec` of the opened data says.

        Latents that are stored normalised keep the scaling of the config, which decodes them.
        """
        stored = spec.holds != "pixels" and not spec.scaling.is_identity
        return dataclasses.replace(self, data=self.data.of_data(spec), latents=spec.scaling if stored else self.latents)
