"""A small CNN classifier whose 64 features carry the distance we call FD-CNN (it is not FID).

It learns in seconds from the real images of the data set under test, so a number exists where no pretrained
network fits (8x8 digits). Two classifiers give two scales: store the checksum beside every number.
"""

import dataclasses
import functools
import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ig_jax.errors import UserError, check
from ig_jax.files import atomic_file

FEATURES = 64
BATCH = 64  # images a training step
PEAK_RATE = 3e-3  # Adam, after WARMUP steps, then a cosine to zero
WARMUP = 100  # steps
REPORT_EVERY = 100  # steps between calls of `progress`


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A trained classifier of uint8 images.

    params: path -> float32 array. image_shape: (H, W, C). checksum: sha256 (hex) of the parameters' bytes in
    the order of their sorted paths. test_accuracy: fraction 0..1 of held-out real images classified rightly.
    train_steps: steps. seed: of initial weights, batches and shifts.
    """

    params: dict[str, np.ndarray]
    num_classes: int
    image_shape: tuple[int, int, int]
    checksum: str
    test_accuracy: float
    train_steps: int
    seed: int


class FeatureNet(nnx.Module):
    """Four 3x3 convolutions with ReLU, a mean over the image (the 64 features) and one linear layer.

    uint8 (B,H,W,C) -> features float32 (B,64), logits float32 (B,num_classes).
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, *, rngs: nnx.Rngs):
        # TPU and GPU round float32 products unless told not to; the same weights must give the same number.
        linear = functools.partial(nnx.Linear, precision=jax.lax.Precision.HIGHEST, rngs=rngs)
        widths = (image_shape[2], 32, 64, 64, FEATURES)
        self.strides = _strides(min(image_shape[:2]))
        self.convolutions = nnx.List(
            linear(9 * before, after, kernel_init=nnx.initializers.he_normal())
            for before, after in zip(widths, widths[1:]))
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
    """Gather 3x3 neighbourhoods, zeros outside: (B,H,W,C) -> (B, ceil(H/stride), ceil(W/stride), 9C).

    A convolution is then one matrix product: inside a compiled loop XLA's CPU convolution takes a slow path
    (over 10 times slower, measured with jax 0.10 on 2 cores).
    """
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.concatenate(
        [padded[:, i:i + height:stride, j:j + width:stride] for i in range(3) for j in range(3)], axis=-1)


def train_classifier(train_images: np.ndarray, train_labels: np.ndarray, test_images: np.ndarray,
                     test_labels: np.ndarray, *, num_classes: int, seed: int = 0, steps: int = 1500,
                     progress: Callable[[int, float], None] | None = None) -> Classifier:
    """Train on real images, uint8 (N,H,W,C) in 0..255 with integer labels (N,), and measure on held-out ones.

    The same seed on the same machine gives the same parameters to the bit. progress: called with (steps done,
    loss of the last batch) every 100 steps.
    Raises: UserError if shapes, dtypes, labels or steps are out of range.
    """
    check(steps >= 1, "steps", steps, "at least 1")
    shape = tuple(np.shape(train_images)[1:])
    for name, images, labels in (("train", train_images, train_labels), ("test", test_images, test_labels)):
        _check_images(f"{name}_images", images, shape)
        labels = np.asarray(labels)
        check(labels.shape == (len(images),) and len(labels) > 0, f"{name}_labels.shape", labels.shape,
              f"({len(images)},), one for each image, and not empty")
        check(0 <= labels.min() and labels.max() < num_classes, f"{name}_labels",
              (int(labels.min()), int(labels.max())), f"in 0..{num_classes - 1}")
    params = nnx.state(FeatureNet(shape, num_classes, rngs=nnx.Rngs(seed)), nnx.Param)
    carry = params, _optimizer(steps).init(params), jnp.zeros(())
    data = jnp.asarray(train_images), jnp.asarray(train_labels, jnp.int32)
    for start in range(0, steps, REPORT_EVERY):
        stop = min(start + REPORT_EVERY, steps)
        carry = _train(carry, data, jax.random.key(seed), start, stop, shape, num_classes, steps)
        if progress is not None:
            progress(stop, float(carry[2]))
    params = _flatten(carry[0])
    classifier = Classifier(params, num_classes, shape, _checksum(params), 0.0, steps, seed)
    right = features_and_predictions(classifier, test_images)[1] == np.asarray(test_labels)
    return dataclasses.replace(classifier, test_accuracy=float(right.mean()))


def _optimizer(steps: int) -> optax.GradientTransformation:
    """Adam with warm-up and a cosine to zero at `steps`."""
    warmup = min(WARMUP, steps // 2)
    return optax.adam(optax.warmup_cosine_decay_schedule(0.0, PEAK_RATE, warmup, steps))


@functools.partial(jax.jit, static_argnames=("shape", "num_classes", "steps"), donate_argnames="carry")
def _train(carry, data, key, start, stop, shape, num_classes, steps):
    """Run steps [start, stop); carry = (params, optimizer state, loss), data = (images, labels)."""
    images, labels = data
    graphdef = _template(shape, num_classes)[0]

    def step(i, carry):
        params, opt_state, _ = carry
        pick_key, shift_key = jax.random.split(jax.random.fold_in(key, i))
        picked = jax.random.randint(pick_key, (BATCH,), 0, len(images))
        batch = _shift(shift_key, images[picked])

        def loss_fn(params):
            logits = nnx.merge(graphdef, params)(batch)[1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[picked]).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = _optimizer(steps).update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return jax.lax.fori_loop(start, stop, step, carry)


def _shift(key: jax.Array, images: jax.Array) -> jax.Array:
    """Move each image (B,H,W,C) by -1, 0 or 1 pixel both ways, repeating its border."""
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    corners = jax.random.randint(key, (len(images), 2), 0, 3)
    crop = jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:]))
    return crop(padded, corners)


def features_and_predictions(classifier: Classifier, images: np.ndarray,
                             batch: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 (N,64) and predicted labels int32 (N,) of uint8 images (N,H,W,C) in 0..255.

    batch: images at a time; the last one is padded, so any N compiles once.
    Raises: UserError if the images are not of the classifier's shape or not uint8.
    """
    _check_images("images", images, classifier.image_shape)
    features = np.empty((len(images), FEATURES), np.float32)
    predictions = np.empty(len(images), np.int32)
    params = jax.device_put(classifier.params)
    for start in range(0, len(images), batch):
        part = np.asarray(images[start:start + batch])
        padded = np.pad(part, ((0, batch - len(part)), (0, 0), (0, 0), (0, 0)))
        found, labels = _forward(params, padded, classifier.image_shape, classifier.num_classes)
        features[start:start + batch] = np.asarray(found)[:len(part)]
        predictions[start:start + batch] = np.asarray(labels)[:len(part)]
    return features, predictions


@functools.partial(jax.jit, static_argnames=("shape", "num_classes"))
def _forward(params, images, shape, num_classes):
    """Features (B,64) and predicted labels (B,) of one batch."""
    graphdef, treedef, paths = _template(shape, num_classes)
    state = jax.tree.unflatten(treedef, [params[path] for path in paths])
    features, logits = nnx.merge(graphdef, state)(images)
    return features, logits.argmax(-1).astype(jnp.int32)


@functools.cache
def _template(shape: tuple[int, int, int], num_classes: int):
    """Graph definition, tree structure and shapes by path of the network's parameters, without making any."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: FeatureNet(shape, num_classes, rngs=nnx.Rngs(0))))
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return graphdef, jax.tree.structure(state), {_name(path): leaf.shape for path, leaf in leaves}


def _name(path) -> str:
    """Write a tree path as 'convolutions/0/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def _flatten(state: nnx.State) -> dict[str, np.ndarray]:
    """Turn the network's parameters into path -> float32 array on the host."""
    return {_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def _checksum(params: dict[str, np.ndarray]) -> str:
    """Return the sha256 (hex) of the little-endian float32 parameters in the order of their sorted paths."""
    digest = hashlib.sha256()
    for path in sorted(params):
        digest.update(np.ascontiguousarray(params[path], "<f4").tobytes())
    return digest.hexdigest()


def save(classifier: Classifier, path: str | os.PathLike) -> None:
    """Write a classifier as one npz. Raises: UserError if the file cannot be written."""
    facts = {field.name: getattr(classifier, field.name) for field in dataclasses.fields(classifier)
             if field.name != "params"}
    with atomic_file(path) as file:
        np.savez(file, facts=np.array(json.dumps(facts)), **classifier.params)


def load(path: str | os.PathLike) -> Classifier:
    """Read a classifier and verify its parameters against its checksum.

    Raises: UserError if the file is missing, damaged, or holds other parameters than its checksum says.
    """
    name, mend = repr(os.fspath(path)), "delete it, and the next evaluation trains another"
    try:
        # Opened here: np.load leaks the file when it turns out to be no archive.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            params = {key: archive[key] for key in archive.files if key != "facts"}
            facts = json.loads(str(archive["facts"]))
        classifier = Classifier(params=params, **{**facts, "image_shape": tuple(facts["image_shape"])})
        expected = _template(classifier.image_shape, classifier.num_classes)[2]
    except FileNotFoundError as error:
        raise UserError(f"no classifier at {name}; train one first") from error
    except (OSError, EOFError, ValueError, TypeError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"cannot read the classifier {name} ({_first_line(error)}); {mend}") from error
    fits = {key: (array.shape, str(array.dtype)) for key, array in params.items()} == {
        key: (shape, "float32") for key, shape in expected.items()}
    if not fits or _checksum(params) != classifier.checksum:
        raise UserError(f"the classifier {name} does not match its checksum {classifier.checksum!r}; {mend}")
    return classifier


def _first_line(error: Exception) -> str:
    """Name an error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _check_images(name: str, images: np.ndarray, shape: tuple[int, int, int]) -> None:
    """Raise UserError unless images are uint8 (N, *shape)."""
    check(len(shape) == 3, f"{name}.shape", np.shape(images), "(N, H, W, C)")
    check(np.ndim(images) == 4 and np.shape(images)[1:] == tuple(shape), f"{name}.shape", np.shape(images),
          f"(N, {', '.join(map(str, shape))})", "use a classifier trained on images of this size")
    check(images.dtype == np.uint8, f"{name}.dtype", str(images.dtype), "uint8 in 0..255")
