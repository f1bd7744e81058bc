"""Forms of published weights: wrappers, averages, parts for training, shards, folders, diffusers, the hub."""

import contextlib
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toy
from refusal import refused

from ig_jax import convert
from ig_jax.base.schema import bind
from ig_jax.checkpoints import autoencoder as autoencoder_checkpoint
from ig_jax.checkpoints.steps import stored_meta
from ig_jax.config.experiment import Experiment
from ig_jax.generation import pretrained
from ig_jax.interop import autoencoder_weights, diffusers_dit, published
from ig_jax.interop.importing import ARITHMETIC
from ig_jax.models import autoencoder as autoencoders
from ig_jax.models import zoo
from ig_jax.models.autoencoder import AutoencoderConfig
from ig_jax.models.dit import DiTConfig
from ig_jax.models.layers import sincos_positions
from ig_jax.weightfiles.files import LazyTensor, write_safetensors, write_torch

sys.path.insert(0, str(Path(__file__).parent / "golden"))
import variants

SIZE = dict(input_size=8, channels=4, patch_size=2, depth=2, width=16, num_heads=2, mlp_ratio=4.0, num_classes=10)
SIT = DiTConfig(**zoo.FAMILIES["sit"], **SIZE, inter_depth=(1,), **ARITHMETIC)
PLAIN = DiTConfig(**zoo.FAMILIES["sit"], **SIZE, inter_depth=(), **ARITHMETIC)
DIT = DiTConfig(**zoo.FAMILIES["dit"], **SIZE, inter_depth=(), **ARITHMETIC)
HEADS = ("--num_heads=2", "--inter_depth=1")
AUTOENCODER = AutoencoderConfig((4, 8), 1, 4, groups=2)


def state(model: DiTConfig = SIT, offset: float = 0.0) -> dict[str, np.ndarray]:
    """The published state dict of a network with hashed weights and computed positions."""
    shapes = published.published_shapes(model)
    arrays = {name: variants.weight(name, shape) + np.float32(offset) for name, shape in shapes.items()}
    return arrays | {"pos_embed": sincos_positions(model.side, model.width)[None]}


def prefixed(prefix: str, arrays: dict) -> dict:
    return {prefix + name: array for name, array in arrays.items()}


def lazy(tree):
    """The same nested dicts with a LazyTensor for each array."""
    if isinstance(tree, dict):
        return {key: lazy(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return list(map(lazy, tree))
    return LazyTensor.of(tree) if isinstance(tree, np.ndarray) else tree


@contextlib.contextmanager
def opened(file: Path, *argv: str):
    """The import that the command makes of `file`, before anything is written."""
    toy.fresh(convert.FLAGS)(["convert", f"--from={file}", "--out=unused", *argv])
    with convert.opened(file, {}) as job:
        yield job


def params(file: Path, *argv: str) -> dict[str, np.ndarray]:
    with opened(file, *argv) as job:
        (item,) = (arrays for name, arrays in job.read().items() if name.startswith("ema_"))
        return {name: np.asarray(array) for name, array in item.items()}


def own(arrays: dict, model: DiTConfig = SIT) -> dict[str, np.ndarray]:
    """The parameters that published arrays are."""
    return dict(published.read_params({name: lambda a=a: a for name, a in arrays.items()}, model))


def same(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].tobytes() == np.ascontiguousarray(array).tobytes(), name


WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "module._orig_mod.", "_orig_mod.module.module.")


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_wrappers_are_taken_off_in_any_order(tmp_path, wrapper, suffix):
    file, arrays = tmp_path / f"a{suffix}", lazy(prefixed(wrapper, state()))
    write_torch(file, {"ema": arrays}) if suffix == ".pt" else write_safetensors(file, arrays)
    same(params(file, *HEADS), own(state()))


def test_wrappers_inside_the_network_are_taken_off_too(tmp_path):
    arrays = {name.replace("blocks.1.", "blocks.1._fsdp_wrapped_module."): a for name, a in state().items()}
    write_torch(tmp_path / "a.pt", lazy(prefixed("_fsdp_wrapped_module.", arrays)))
    same(params(tmp_path / "a.pt", *HEADS), own(state()))


def test_keys_that_clash_without_their_wrappers_are_refused(tmp_path):
    file = tmp_path / "a.pt"
    write_torch(file, lazy({"ema": state() | {"module._orig_mod.pos_embed": np.zeros((1, 16, 16), "f4")}}))
    with refused(str(file), says="'pos_embed' twice"), opened(file):
        pass


RAW, AVERAGE = state(offset=1.0), state()
PLACES = {
    "ema": {"model": RAW, "ema": AVERAGE},
    "ema_state_dict": {"model_state_dict": RAW, "ema_state_dict": AVERAGE},
    "state_dict_ema": {"state_dict": RAW, "state_dict_ema": AVERAGE},
    "ema.shadow": {"model": RAW, "ema": {"decay": 0.9999, "shadow": AVERAGE}},
    "ema.ema_model": {
        "model": RAW,
        "ema": {"step": np.array(9), **prefixed("online_model.", RAW), **prefixed("ema_model.", AVERAGE)},
    },
    "state_dict.ema": {"state_dict": prefixed("net.", RAW) | prefixed("ema.", AVERAGE), "epoch": 3},
    "ema_model": prefixed("model.", RAW) | prefixed("ema_model.module.", AVERAGE),
    "averaged_model": {"averaged_model": {"n_averaged": np.array(3), **prefixed("module.", AVERAGE)}, "model": RAW},
}


@pytest.mark.parametrize("place", PLACES)
def test_the_average_is_found_where_training_codes_keep_it(tmp_path, place):
    write_torch(tmp_path / "a.pt", lazy(PLACES[place]))
    same(params(tmp_path / "a.pt", *HEADS), own(AVERAGE))
    same(params(tmp_path / "a.pt", *HEADS, f"--which={place}"), own(AVERAGE))
    with opened(tmp_path / "a.pt", *HEADS) as job:
        assert job.experiment.ema.decays == (0.9999,) and f"a.pt, {place}" in job.describe()


@pytest.mark.parametrize("place", ["ema", "ema_state_dict", "state_dict_ema", "ema.shadow", "state_dict.ema"])
def test_raw_weights_are_asked_for_and_called_so(tmp_path, place):
    write_torch(tmp_path / "a.pt", lazy(PLACES[place]))
    same(params(tmp_path / "a.pt", *HEADS, "--which=model"), own(RAW))
    with opened(tmp_path / "a.pt", *HEADS, "--which=model") as job:
        assert job.experiment.ema.decays == (0.0,) and "the raw weights" in job.describe()


@pytest.mark.parametrize("prefix", ["net.", "model.", "network.module."])
def test_the_only_set_of_a_lightning_file_is_taken(tmp_path, prefix):
    write_torch(tmp_path / "a.ckpt", lazy({"state_dict": prefixed(prefix, AVERAGE), "global_step": 9}))
    same(params(tmp_path / "a.ckpt", *HEADS), own(AVERAGE))


@pytest.mark.parametrize(
    "tree, listed",
    [
        ({"model_state_dict": RAW}, '"model_state_dict"'),
        ({"weights": RAW, "other": RAW}, '"weights", "other"'),
        ({"state_dict": RAW, "ema": {"shadow_params": [AVERAGE["pos_embed"]]}}, '"state_dict"'),  # diffusers' EMAModel
        ({"state_dict": prefixed("model.", RAW) | {"model_ema.num_updates": np.array(3)}}, '"state_dict.model"'),
        ({"ema1": RAW, "ema2": AVERAGE}, '"ema1", "ema2"'),
    ],
)
def test_where_no_set_or_several_are_the_average_they_are_listed(tmp_path, tree, listed):
    file = tmp_path / "a.pt"
    write_torch(file, lazy(tree))
    with refused(str(file), says=listed, fix="--which="), opened(file):
        pass
    first = listed.split('"')[1]
    same(params(file, *HEADS, f"--which={first}"), own(RAW))


REPA = {f"projectors.0.{i}.{kind}": np.ones((3, 3), "f4") for i in (0, 2, 4) for kind in ("weight", "bias")}
SRA = {f"ap_head.linear{i}.weight": np.ones((3, 3), "f4") for i in (1, 2)}
PROFILED = {"total_ops": np.zeros(1), "blocks.0.attn.total_params": np.zeros(1)}
TEACHER = prefixed("teacher.", {"blocks.0.weight": np.ones(3, "f4")})
REG = {
    "cls_projectors2.weight": np.ones((16, 3), "f4"),
    "wg_norm.weight": np.ones(16, "f4"),
    "final_layer.linear_cls.weight": np.ones((3, 16), "f4"),
    "pos_embed": np.concatenate([np.zeros((1, 1, 16), "f4"), state()["pos_embed"]], 1),
}
TRAINING = {
    "REPA": (REPA, "projectors"),
    "SRA": (SRA, "ap_head"),
    "REG": (REPA | REG, "projectors, cls_projectors2, wg_norm, final_layer.linear_cls"),
    "DispLoss": ({}, "nothing"),
    "profiler": (PROFILED, "total_ops, total_params"),
    "teacher": (TEACHER, "teacher"),
}


@pytest.mark.parametrize("form", TRAINING)
def test_parts_that_only_training_needs_are_left_out_and_named(tmp_path, form):
    more, named = TRAINING[form]
    write_torch(tmp_path / "a.pt", lazy({"ema": state(PLAIN) | more}))
    same(params(tmp_path / "a.pt", "--num_heads=2"), own(state(PLAIN), PLAIN))
    with opened(tmp_path / "a.pt", "--num_heads=2") as job:
        assert f"left out    {named}\n" in job.describe()


def test_what_stands_next_to_the_network_is_named(tmp_path):
    arrays = (
        prefixed("net.", state()) | prefixed("vae.", {"encoder.x.weight": np.ones(3, "f4")}) | {"scale": np.ones(1)}
    )
    write_torch(tmp_path / "a.ckpt", lazy({"state_dict": arrays}))
    with opened(tmp_path / "a.ckpt", *HEADS) as job:
        assert "left out    vae, scale\n" in job.describe()


@pytest.mark.parametrize("name", ["projection.weight", "blocks.0.adapter.weight", "cls_token", "total_energy"])
def test_anything_else_inside_the_network_is_an_error(tmp_path, name):
    write_torch(tmp_path / "a.pt", lazy({"ema": state() | {name: np.ones((2, 2), "f4")}}))
    with refused(f"tensor {name} shape", says="belongs to no part"), opened(tmp_path / "a.pt", *HEADS):
        pass


@pytest.mark.parametrize("form", ["REPA", "REG", "SRA", "DispLoss"])
def test_such_forms_gain_a_head_by_training(tmp_path, form):
    """The network without a head, as it is retrofitted: only the new head is initialised."""
    write_torch(tmp_path / "a.pt", lazy({"ema": state(PLAIN) | TRAINING[form][0]}))
    convert_file(tmp_path / "a.pt", tmp_path / "run", "--num_heads=2")
    from ig_jax.parallel.mesh import make_mesh
    from ig_jax.training.initialise import starting_weights

    stored = bind(Experiment, pretrained.load(tmp_path / "run").config)
    init = toy.replace(stored.init, checkpoint=str(tmp_path / "run"))
    e = toy.replace(stored, model=SIT, loss=toy.replace(stored.loss, inter_weight=(0.5,)), init=init)
    weights = starting_weights(e, make_mesh())
    same({name: np.asarray(array) for name, array in weights.items()}, own(state(PLAIN), PLAIN))


def convert_file(file, out: Path, *argv: str) -> None:
    toy.fresh(convert.FLAGS)(["convert", f"--from={file}", f"--out={out}", *argv])
    convert.main()


def export_file(checkpoint: Path, to: Path) -> None:
    toy.fresh(convert.FLAGS)(["convert", f"--to={to}", f"--checkpoint={checkpoint}"])
    convert.main()


def test_the_first_bytes_decide_what_a_file_is(tmp_path):
    write_torch(tmp_path / "torch.safetensors", {"ema": lazy(state())})
    write_safetensors(tmp_path / "safe.pt", lazy(state()))
    write_safetensors(tmp_path / "safe", lazy(state()))
    for name in ("torch.safetensors", "safe.pt", "safe"):
        same(params(tmp_path / name, *HEADS), own(state()))


def shards(folder: Path, arrays: dict, stem: str = "model", write=write_safetensors, suffix=".safetensors") -> Path:
    """Two shards and their index."""
    folder.mkdir(exist_ok=True)
    names = list(arrays)
    files = [f"{stem}-0000{i}-of-00002{suffix}" for i in (1, 2)]
    places = {name: files[i >= len(names) // 2] for i, name in enumerate(names)}
    for file in files:
        write(folder / file, lazy({name: arrays[name] for name in names if places[name] == file}))
    index = folder / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.mark.parametrize("write, suffix", [(write_safetensors, ".safetensors"), (write_torch, ".bin")])
def test_shards_are_read_by_their_index_or_folder(tmp_path, write, suffix):
    index = shards(tmp_path / "hub", state(), write=write, suffix=suffix)
    for place in (index, index.parent):
        same(params(place, *HEADS), own(state()))
    one = index.with_name(f"model-00001-of-00002{suffix}")
    with refused(str(one), says="is shard 1 of 2", fix="give the .index.json"), opened(one):
        pass
    index.with_name(f"model-00002-of-00002{suffix}").unlink()
    with refused(str(index.with_name(f"model-00002-of-00002{suffix}")), says="is not a file"), opened(index):
        pass


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"weight_map": {"a": "../b.safetensors"}}', '{"weight_map": {"a": 1}}', "x"]
)
def test_an_index_that_is_none_is_refused(tmp_path, content):
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(content)
    with refused(str(file), says="is no index of shards"), opened(file):
        pass


def test_an_index_that_lists_what_no_shard_holds_is_refused(tmp_path):
    index = shards(tmp_path / "hub", state())
    places = json.loads(index.read_text())
    places["weight_map"]["more"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(places))
    with refused(str(index), says="lists 'more'"), opened(index):
        pass


def test_a_folder_is_its_only_weight_file(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", lazy(state()))
    write_torch(tmp_path / "pytorch_model.bin", lazy(state()))  # the same in another format, as snapshots have it
    same(params(tmp_path, *HEADS), own(state()))
    write_safetensors(tmp_path / "other.safetensors", lazy(state()))
    with refused(str(tmp_path), says="2 weight files: model.safetensors, other.safetensors", fix="one of them"):
        with opened(tmp_path):
            pass
    (tmp_path / "one").mkdir()
    write_safetensors(tmp_path / "one" / "model-00001-of-00001.safetensors", lazy(state()))
    same(params(tmp_path / "one", *HEADS), own(state()))
    (tmp_path / "empty").mkdir()
    with refused(str(tmp_path / "empty"), says="no weight file"), opened(tmp_path / "empty"):
        pass


def autoencoder(naming: str) -> dict[str, np.ndarray]:
    weights = {name: variants.weight(name, leaf.shape) for name, leaf in autoencoders.shapes(AUTOENCODER).items()}
    return autoencoder_weights.to_published(weights, AUTOENCODER, naming)


UNET = {
    "model.diffusion_model.out.2.weight": np.zeros((4, 4), "f4"),
    "cond_stage_model.transformer.x": np.zeros(2, "f4"),
}


@pytest.mark.parametrize(
    "prefix, more, left_out",
    [
        ("first_stage_model.", UNET, "model, cond_stage_model"),
        ("first_stage_model.", {}, "nothing"),
        ("vae.", {}, "nothing"),
        ("_orig_mod.module.", {}, "nothing"),
        ("module.vae._orig_mod.", {}, "nothing"),
        ("", {"loss.logvar": np.zeros((), "f4"), "model_ema.decay": np.zeros((), "f4")}, "nothing"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda tree: tree, lambda tree: {"state_dict": tree, "epoch": 3}])
def test_an_autoencoder_is_found_inside_another_file(tmp_path, prefix, more, left_out, wrap):
    write_torch(tmp_path / "a.ckpt", lazy(wrap(prefixed(prefix, autoencoder("ldm")) | more)))
    (tmp_path / "config.json").write_text('{"norm_num_groups": 2}')
    with opened(tmp_path / "a.ckpt") as job:
        found = job.read()
        assert job.config == AUTOENCODER and job.describe().endswith(f"left out    {left_out}")
    for name, array in found.items():
        assert array.tobytes() == variants.weight(name, array.shape).tobytes(), name


@pytest.mark.parametrize("naming", autoencoder_weights.NAMINGS)
def test_an_autoencoder_is_given_back_in_the_layout_that_came(tmp_path, naming):
    write_safetensors(tmp_path / "a.safetensors", lazy(autoencoder(naming)))
    (tmp_path / "config.json").write_text('{"norm_num_groups": 2}')
    convert_file(tmp_path / "a.safetensors", tmp_path / "vae")
    export_file(tmp_path / "vae", tmp_path / "back.safetensors")
    (projection,) = (
        a for name, a in autoencoder(naming).items() if re.fullmatch(r"encoder\..*(to_k|key|\.k)\.weight", name)
    )
    assert projection.ndim == (4 if naming in ("ldm", "diffusers_conv", "diffusers_old_conv") else 2)
    from ig_jax.weightfiles.files import open_weights
    from ig_jax.weightfiles.sets import choose

    with open_weights(tmp_path / "back.safetensors") as back:
        tensors = choose(back, "").tensors
        wanted = autoencoder(naming)
        assert {name: t.shape for name, t in tensors.items()} == {name: a.shape for name, a in wanted.items()}
        assert all(tensors[name].read().tobytes() == array.tobytes() for name, array in wanted.items())


def diffusers_state(model: DiTConfig = DIT) -> dict[str, np.ndarray]:
    tensors = diffusers_dit.from_release(lazy(state(model)), model)
    return {name: tensor.read() for name, tensor in tensors.items()}


def test_diffusers_names_are_those_of_its_own_code(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed; pip install -e .[torch]")
    torch = pytest.importorskip("torch")
    config = json.loads(diffusers_dit.pipeline_files(DIT, [], None)["transformer/config.json"])
    theirs = diffusers.DiTTransformer2DModel(**{k: v for k, v in config.items() if not k.startswith("_")}).eval()
    arrays = diffusers_state()
    theirs.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})  # strict
    # Its frequencies of the time embedding are a little apart from the release's, on which the weights were trained.
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, t, y = variants.hashed("x", (2, 4, 8, 8)), np.array([10.0, 700.0], "f4"), np.array([3, 10])
    with torch.no_grad():
        want = theirs(
            torch.from_numpy(x), timestep=torch.from_numpy(t), class_labels=torch.from_numpy(y)
        ).sample.numpy()
    from ig_jax.models import dit

    found = dit.apply(DIT, own(state(DIT), DIT), np.moveaxis(x, 1, -1), t, y)
    np.testing.assert_allclose(np.moveaxis(np.asarray(found.final), -1, 1), want, atol=2e-5)


@pytest.mark.parametrize("place", ["file", "config", "folder"])
def test_a_dit_of_diffusers_is_the_release_s(tmp_path, place):
    folder = tmp_path / "transformer"
    folder.mkdir()
    file, flags = folder / diffusers_dit.FILE, ["--num_heads=2", "--input_size=8"]
    write_safetensors(file, lazy(diffusers_state()))
    if place != "file":
        (folder / "config.json").write_text(json.dumps({"num_attention_heads": 2, "sample_size": 8}))
        flags = []
    same(params(folder if place == "folder" else file, *flags), own(state(DIT), DIT))
    with opened(file, *flags) as job:
        assert (job.family, job.experiment.model, job.experiment.process.kind) == ("dit", DIT, "gaussian")


def test_blocks_with_embedders_of_their_own_are_no_dit_of_the_release(tmp_path):
    arrays = diffusers_state()
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    write_safetensors(tmp_path / "a.safetensors", lazy(arrays | {name: arrays[name] + 1}))
    with refused("t_embedder.mlp.0.bias", says="differs between blocks"):
        params(tmp_path / "a.safetensors", "--num_heads=2", "--input_size=8")
    del arrays["transformer_blocks.1.attn1.to_k.bias"]
    write_safetensors(tmp_path / "b.safetensors", lazy(arrays))
    with refused("shapes of transformer_blocks.1.attn1.to_q, k, v", [[16], "missing", [16]]):
        params(tmp_path / "b.safetensors", "--num_heads=2")


def test_the_pipeline_of_diffusers_comes_and_goes(tmp_path):
    """The folder written here has the tensors of the one read, and is read again."""
    there = tmp_path / "there"
    for name, text in diffusers_dit.pipeline_files(DIT, [str(i) for i in range(10)], AUTOENCODER).items():
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_text(text)
    write_safetensors(there / "transformer" / diffusers_dit.FILE, lazy(diffusers_state()))
    write_safetensors(there / "vae" / diffusers_dit.FILE, lazy(autoencoder("diffusers")))
    convert_file(there, tmp_path / "run")
    same({n: np.asarray(a) for n, a in pretrained.load(tmp_path / "run").params.items()}, own(state(DIT), DIT))
    assert autoencoder_checkpoint.load(tmp_path / "run" / "autoencoder")[0] == AUTOENCODER
    export_file(tmp_path / "run", tmp_path / "back")
    files = sorted(path.relative_to(there) for path in there.rglob("*") if path.is_file())
    assert files == sorted(
        path.relative_to(tmp_path / "back") for path in (tmp_path / "back").rglob("*") if path.is_file()
    )
    for name in files:
        assert (there / name).read_bytes() == (tmp_path / "back" / name).read_bytes(), name
    export_file(tmp_path / "run", tmp_path / "file.safetensors")  # a file keeps the names that came
    same(params(tmp_path / "file.safetensors", "--num_heads=2", "--input_size=8"), own(state(DIT), DIT))
    with refused("--to", says="only of DiT without an intermediate head", fix=".safetensors"):
        diffusers_dit.from_release({}, SIT)


REVISION = "0123456789abcdef0123456789abcdef01234567"


def cached(home: Path, repository: str, files: dict[str, Path]) -> None:
    """The hub's cache as its library leaves it: blobs, links to them in the snapshot, and the name of the revision."""
    folder = home / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "refs" / "main").write_text(REVISION)
    for name, file in files.items():
        data = file.read_bytes()
        blob = folder / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        link = folder / "snapshots" / REVISION / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)


@pytest.mark.parametrize("place", ["SiT/0800000.pt", "SiT", "SiT/nothing.pt"])
def test_a_file_of_the_hub_comes_from_its_cache_when_offline(tmp_path, place):
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed; pip install -e .[hub]")
    write_torch(tmp_path / "a.pt", {"ema": lazy(state())})
    cached(tmp_path / "home", "CVLUESTC/Internal-Guidance", {"SiT/0800000.pt": tmp_path / "a.pt"})
    environment = toy.environment() | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [f"--from=hf:CVLUESTC/Internal-Guidance/{place}", f"--out={tmp_path / 'run'}", *HEADS]
    done = subprocess.run(
        [sys.executable, "-m", "ig_jax.convert", *command],
        cwd=toy.ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    if "nothing" in place:
        assert done.returncode == 2 and "not in the cache while offline" in done.stderr and done.stderr.count("\n") == 1
        return
    assert done.returncode == 0, done.stderr
    source = stored_meta(tmp_path / "run")["source"]
    digest = hashlib.sha256((tmp_path / "a.pt").read_bytes()).hexdigest()
    assert source["hub"] == f"CVLUESTC/Internal-Guidance/{place}" and source["revision"] == REVISION
    assert source["sha256"] == {"0800000.pt": digest}
    same({n: np.asarray(a) for n, a in pretrained.load(tmp_path / "run").params.items()}, own(state()))


@pytest.mark.parametrize("url", ["ftp://host/a.pt", "https://huggingface.co/a/b/resolve/main/a.pt"])
def test_urls_are_refused_before_anything_is_written(tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    write_torch(tmp_path / "a.pt", {"ema": lazy(state())})
    with refused("--from", url, expected="a path on this machine"):
        convert_file(url, tmp_path / "run")
    with refused("--out", url, expected="a path on this machine"):
        convert_file("a.pt", url)
    with refused("--to", url, expected="a path on this machine"):
        export_file(tmp_path / "run", url)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("place", ["hf:", "hf:owner", "hf:owner/name with space/x"])
def test_what_names_no_place_on_the_hub_is_refused(place):
    from ig_jax.interop import hub

    with refused("hub file", place, expected="hf:OWNER/NAME/FILE"):
        hub.located(place, "--from")
