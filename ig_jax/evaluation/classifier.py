"""A small CNN classifier whose 64 features define the distance FD-CNN (which is not FID).

It is trained in seconds on the real images of the data set under test, for data that no pretrained network fits (8x8
digits). Distances of different classifiers are not comparable: its checksum is stored with every number.
"""

import dataclasses
import functools
import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ig_jax.base.errors import UserError, check, one_line
from ig_jax.base.files import atomic_file
from ig_jax.base.progress import Progress
from ig_jax.data.sources import Source
from ig_jax.parallel import processes

FEATURES = 64
BATCH = 64  # images in a training step
PEAK_RATE = 3e-3  # Adam, after WARMUP steps, then a cosine to zero
WARMUP = 100  # steps
STEPS = 1500
REPORT_EVERY = 100  # steps between calls of `progress`; their images are in memory together
CHUNK = 512  # images read at once, and in a forward pass


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A trained classifier of uint8 images, a FeatureNet."""

    params: dict[str, np.ndarray]  # float32 arrays by path
    num_classes: int
    image_shape: tuple[int, int, int]  # (H, W, C)
    checksum: str  # sha256 (hex) of the bytes of the parameters in the order of their sorted paths
    test_accuracy: float = 0.0  # fraction of held-out real images classified correctly

    def __call__(self, images: np.ndarray, batch: int = CHUNK) -> dict[str, np.ndarray]:
        """ "features" float32 (N, 64) and "prediction" int32 (N,), the class, of images uint8 (N, H, W, C).

        batch: images in a forward pass; the last one is padded, so that any N compiles once.
        Raises: UserError if the images are not uint8 or not of the classifier's shape.
        """
        check(images.dtype == np.uint8, "images.dtype", str(images.dtype), "uint8")
        wanted = (len(images), *self.image_shape)
        check(images.shape == wanted, "images.shape", images.shape, f"{wanted}, as the classifier was trained on")
        features, predictions = np.empty((len(images), FEATURES), np.float32), np.empty(len(images), np.int32)
        params = jax.device_put(self.params)
        for start in range(0, len(images), batch):
            part = np.asarray(images[start : start + batch])
            padded = np.pad(part, ((0, batch - len(part)), (0, 0), (0, 0), (0, 0)))
            found, classes = _forward(params, padded, self.num_classes)
            features[start : start + batch] = np.asarray(found)[: len(part)]
            predictions[start : start + batch] = np.asarray(classes)[: len(part)]
        return {"features": features, "prediction": predictions}


class SmallCNN(nnx.Module):
    """Four 3x3 convolutions with ReLU, a mean over the image (the 64 features) and one linear layer.

    uint8 (B, H, W, C) -> features float32 (B, 64), logits float32 (B, num_classes).
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, *, rngs: nnx.Rngs):
        # By default TPUs and GPUs round float32 products; the same weights must give the same number everywhere.
        linear = functools.partial(nnx.Linear, precision=jax.lax.Precision.HIGHEST, rngs=rngs)
        widths = (image_shape[2], 32, 64, 64, FEATURES)
        self.strides = _strides(min(image_shape[:2]))
        self.convolutions = nnx.List(
            linear(9 * before, after, kernel_init=nnx.initializers.he_normal())
            for before, after in zip(widths, widths[1:])
        )
        self.head = linear(FEATURES, num_classes)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = images.astype(jnp.float32) / 127.5 - 1
        for layer, stride in zip(self.convolutions, self.strides):
            x = nnx.relu(layer(_patches(x, stride)))
        features = x.mean((1, 2))
        return features, self.head(features)


def _strides(side: int) -> tuple[int, int, int, int]:
    """Strides of the convolutions that bring an image of `side` pixels to 1..4 (8 -> 2, 16 -> 2, 32 -> 4)."""
    return (2 if side >= 16 else 1, 2, 2 if side >= 64 else 1, 2)


def _patches(x: jax.Array, stride: int) -> jax.Array:
    """Gather 3x3 neighbourhoods, zeros outside: (B, H, W, C) -> (B, ceil(H/stride), ceil(W/stride), 9C).

    A convolution is then one matrix product: inside a compiled loop XLA's CPU convolution takes a slow path
    (over 10 times slower, measured with jax 0.10 on 2 cores).
    """
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.concatenate(
        [padded[:, i : i + height : stride, j : j + width : stride] for i in range(3) for j in range(3)], axis=-1
    )


def train_classifier(
    train: Source,
    test: Source,
    *,
    seed: int = 0,
    steps: int = STEPS,
    progress: Callable[[int, float], None] | None = None,
) -> Classifier:
    """Train on real images and measure the accuracy on held-out ones; both splits are read in batches.

    Images are shifted, and mirrored where train.spec says so. The same seed on the same machine gives bitwise
    identical parameters. progress: called with (steps done, loss of the last batch) every 100 steps.
    Raises: UserError if a split is empty or not of images, the two differ in shape or classes, or a label is invalid.
    """
    check(steps >= 1, "steps", steps, "at least 1")
    for name, source in (("train", train), ("test", test)):
        check(source.spec.holds == "pixels" and len(source) > 0, f"{name} split", source, "at least one uint8 image")
    shape, classes = train.spec.latent_shape, train.spec.num_classes
    found = test.spec.latent_shape, test.spec.num_classes
    check(found == (shape, classes), "test split", found, f"{(shape, classes)}, the shape and classes to train on")
    state = nnx.state(SmallCNN(shape, classes, rngs=nnx.Rngs(seed)), nnx.Param)
    params = {"/".join(map(str, path)): param[...] for path, param in nnx.to_flat_state(state)}
    carry = params, _optimizer(steps).init(params), jnp.zeros(())
    step_keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(jax.random.key(seed), i)))
    for start in range(0, steps, REPORT_EVERY):
        count = min(REPORT_EVERY, steps - start)
        keys = step_keys(start + jnp.arange(count))
        rows = np.asarray(_rows(keys, len(train)))
        batch = train.gather(rows.ravel())
        images, labels = batch["image"].reshape(*rows.shape, *shape), batch["label"].reshape(rows.shape)
        carry = _train(carry, images, labels, keys[:, 1], classes, steps, bool(train.spec.mirrored))
        if progress is not None:
            progress(start + count, float(carry[2]))
    trained = {path: np.asarray(array) for path, array in carry[0].items()}
    classifier = Classifier(trained, classes, shape, _checksum(trained))
    right = sum(int((classifier(images)["prediction"] == labels).sum()) for images, labels in batches(test))
    return dataclasses.replace(classifier, test_accuracy=right / len(test))


def batches(source: Source) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All images uint8 (B, H, W, C) of a source with their labels int32 (B,), in batches."""
    for start in range(0, len(source), CHUNK):
        found = source.gather(np.arange(start, min(start + CHUNK, len(source))))
        yield found["image"], found["label"]


def trained_once(train: Source, test: Source, directory: Path) -> Classifier:
    """The classifier of these data in `directory`, trained at the first call and then read from its file.

    Raises: UserError as train_classifier and load.
    """
    # Eight characters that identify the data, so that no classifier of other images is used.
    specs = [(repr(source), source.spec.latent_shape, source.spec.class_names) for source in (train, test)]
    identity = json.dumps([*specs, bool(train.spec.mirrored)])
    path = directory / f"classifier_{hashlib.sha256(identity.encode()).hexdigest()[:8]}.npz"

    def make() -> Classifier:
        if path.exists():
            return load(path)
        with Progress(STEPS, "classifier steps") as progress:
            advance = lambda done, loss: progress.advance(done - progress.done)
            found = train_classifier(train, test, steps=STEPS, progress=advance)
        save(found, path)
        return found

    found = processes.first_alone(make)
    if processes.is_first():
        print(f"classifier  correct on {found.test_accuracy:.1%} of the real test images, sha256 {found.checksum[:12]}")
    return found


@functools.partial(jax.jit, static_argnames="length")
def _rows(keys: jax.Array, length: int) -> jax.Array:
    """Rows int (S, BATCH) of the images of each step, by its keys (S, 2): of the rows and of the augmentation."""
    return jax.vmap(lambda key: jax.random.randint(key[0], (BATCH,), 0, length))(keys)


def _optimizer(steps: int) -> optax.GradientTransformation:
    """Adam with warm-up and a cosine to zero at `steps`."""
    warmup = min(WARMUP, steps // 2)
    return optax.adam(optax.warmup_cosine_decay_schedule(0.0, PEAK_RATE, warmup, steps))


@functools.partial(jax.jit, static_argnames=("num_classes", "steps", "mirrored"), donate_argnames="carry")
def _train(carry, images, labels, keys, num_classes, steps, mirrored):
    """Run S steps; carry = (params, optimizer state, loss), images (S, B, H, W, C), labels (S, B), keys (S,)."""

    def step(i, carry):
        params, opt_state, _ = carry
        batch = _shift(keys[i], _mirror(keys[i], images[i]) if mirrored else images[i])

        def loss_fn(params):
            logits = _apply(params, batch, num_classes)[1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[i]).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = _optimizer(steps).update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return jax.lax.fori_loop(0, len(images), step, carry)


def _mirror(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirror each image (B, H, W, C) left to right with probability 1/2."""
    chosen = jax.random.bernoulli(jax.random.fold_in(key, 1), shape=(len(images), 1, 1, 1))
    return jnp.where(chosen, images[:, :, ::-1], images)


def _shift(key: jax.Array, images: jax.Array) -> jax.Array:
    """Move each image (B, H, W, C) by -1, 0 or 1 pixel both ways, repeating its border."""
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    corners = jax.random.randint(key, (len(images), 2), 0, 3)
    crop = jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:]))
    return crop(padded, corners)


@functools.partial(jax.jit, static_argnames="num_classes")
def _forward(params, images, num_classes):
    """Features (B, 64) and predicted classes (B,) of one batch."""
    features, logits = _apply(params, images, num_classes)
    return features, logits.argmax(-1).astype(jnp.int32)


def _apply(params: dict, images: jax.Array, num_classes: int) -> tuple[jax.Array, jax.Array]:
    """SmallCNN with these parameters."""
    graphdef, paths, _ = _abstract(images.shape[1:], num_classes)
    state = nnx.from_flat_state({path: nnx.Param(params[name]) for name, path in paths.items()})
    return nnx.merge(graphdef, state)(images)


@functools.cache
def _abstract(image_shape: tuple[int, int, int], num_classes: int):
    """The graphdef of the network, and the path and the shape of each parameter by name."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: SmallCNN(image_shape, num_classes, rngs=nnx.Rngs(0))))
    flat = [("/".join(map(str, path)), path, param.get_value().shape) for path, param in nnx.to_flat_state(state)]
    return graphdef, {name: path for name, path, _ in flat}, {name: shape for name, _, shape in flat}


def _checksum(params: dict[str, np.ndarray]) -> str:
    """The sha256 (hex) of the little-endian float32 parameters in the order of their sorted paths."""
    digest = hashlib.sha256()
    for path in sorted(params):
        digest.update(np.ascontiguousarray(params[path], "<f4").tobytes())
    return digest.hexdigest()


def save(classifier: Classifier, path: str | os.PathLike) -> None:
    """Write a classifier as one npz. Raises: UserError if the file cannot be written."""
    facts = vars(classifier) | {"params": None}
    with atomic_file(path) as file:
        np.savez(file, **(classifier.params | {"facts": np.array(json.dumps(facts))}))  # type: ignore[arg-type]


def load(path: str | os.PathLike) -> Classifier:
    """Read a classifier and verify its parameters against its checksum.

    Raises: UserError if the file is missing, damaged, or its parameters do not match its checksum.
    """
    try:
        # Opened here: np.load leaks the file when it turns out to be no archive.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            params = {key: archive[key] for key in archive.files if key != "facts"}
            facts = json.loads(str(archive["facts"]))
        classifier = Classifier(**facts | {"params": params, "image_shape": tuple(facts["image_shape"])})
        shapes = _abstract(classifier.image_shape, classifier.num_classes)[2]
        if {key: array.shape for key, array in params.items()} != shapes or _checksum(params) != classifier.checksum:
            raise ValueError(f"it does not match its checksum {classifier.checksum!r}")
    except (OSError, EOFError, ValueError, TypeError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        name, fix = os.fspath(path), "delete it, and the next evaluation trains another"
        problem = f"the classifier {name!r} cannot be read ({one_line(error)})"
        raise UserError(problem, name="classifier", value=name, fix=fix) from error
    return classifier
