"""Checkpoints: restored bitwise identical on any mesh; damage is found, named and skipped."""

import asyncio
import functools
import gc
import json
import logging
import math
import resource
import shutil
import sys
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from refusal import refused

from ig_jax.base.errors import UserError
from ig_jax.checkpoints import steps as ckpt
from ig_jax.checkpoints import thinning
from ig_jax.checkpoints.digests import collect_abandoned, first_line, one_report
from ig_jax.generation import pretrained
from ig_jax.optim.optimizer import make_optimizer
from ig_jax.parallel.mesh import make_mesh
from ig_jax.training.state import TrainState, new_state, partition, restored, state_layout

EXPERIMENT = toy.experiment()


@functools.cache
def make_state(step):
    """A state on the host whose every array depends on the step."""
    transformation = make_optimizer(EXPERIMENT.optimizer, 10, EXPERIMENT.model)
    params = {name: value + step for name, value in toy.params().items()}
    ema = {name: jax.tree.map(lambda p: 0.9 * p, params) for name in EXPERIMENT.ema.names}
    return TrainState(
        jnp.int32(step), params, ema, transformation.init(partition(params, EXPERIMENT.optimizer.trains)[0])
    )


def on(mesh, step):
    """(state of that step, layout) on a mesh."""
    state = make_state(step)
    layout = state_layout(lambda: state, mesh)
    return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, layout)), layout


def save(directory, steps, keep=3):
    meta = {"config": EXPERIMENT.as_dict(), "labels": [str(i) for i in range(10)], "data": {}}
    with ckpt.Checkpoints(directory / "checkpoints", keep=keep) as saver:
        for step in steps:
            saver.save(step, on(make_mesh(), step)[0].items(), meta)


def read(directory, mesh):
    """The newest whole state on a mesh, or None."""
    with ckpt.Checkpoints(directory / "checkpoints", read_only=True) as reader:
        return restored(reader, on(mesh, 0)[1])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    save(directory, [1, 2])
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_restored_bitwise_identical_on_another_mesh(saved, axes):
    state = read(saved, make_mesh(**axes))
    assert jax.tree.structure(state) == jax.tree.structure(make_state(2))
    for got, want in zip(jax.tree.leaves(jax.device_get(state)), jax.tree.leaves(make_state(2)), strict=True):
        np.testing.assert_array_equal(got, want)


def test_digest_sees_one_bit_and_a_moved_row_and_no_sharding():
    x = jax.random.normal(jax.random.key(0), (16, 8))
    whole = ckpt.describe({"x": x})
    cut = jax.device_put(x, jax.sharding.NamedSharding(make_mesh(), jax.sharding.PartitionSpec("data")))
    assert ckpt.describe({"x": cut}) == whole
    assert ckpt.describe({"x": x.at[3, 4].set(jnp.nextafter(x[3, 4], jnp.inf))}) != whole
    assert ckpt.describe({"x": x[::-1]}) != whole


def test_only_the_newest_steps_are_kept_and_nothing_half_deleted(tmp_path):
    save(tmp_path, [1, 2, 3, 4], keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]


def damage(directory, step, item, how):
    """Damage all array files of one item, since Orbax chooses which of them a restore reads."""
    for path in (directory / "checkpoints" / str(step) / item).rglob("d/*"):
        content = path.read_bytes()
        middle = len(content) // 2
        path.write_bytes(
            {
                "empty": b"",
                "truncated": content[:middle],
                "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            }.get(how, b"")
        )
        if how == "missing":
            path.unlink()


@pytest.mark.parametrize(
    "item,how",
    [
        ("params", "missing"),
        pytest.param("params", "empty", marks=toy.SLOW),
        pytest.param("params", "truncated", marks=toy.SLOW),
        ("params", "flipped"),
        ("ema_0.999", "flipped"),
        ("optimizer", "flipped"),
    ],
)
def test_a_damaged_array_file_is_passed_over_for_the_step_before(copy, item, how, capsys):
    damage(copy, 2, item, how)
    assert int(read(copy, make_mesh()).step) == 1
    assert "step 2 is damaged" in capsys.readouterr().err


def test_a_run_goes_on_past_a_step_that_was_passed_over(copy):
    """With one step kept, a damaged newest step would stay, and every later save would be deleted."""
    damage(copy, 2, "params", "flipped")
    (copy / "checkpoints" / "9").mkdir()
    with ckpt.Checkpoints(copy / "checkpoints", keep=1) as saver:
        state = restored(saver, on(make_mesh(), 0)[1])
        assert int(state.step) == 1
        saver.save(2, state.items(), {})
    assert sorted(p.name.split("-")[0] for p in (copy / "checkpoints" / "damaged").iterdir()) == ["2", "9"]
    assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == ["2", "damaged"]
    assert int(read(copy, make_mesh()).step) == 2


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        PermissionError(13, "Permission denied"),
        OSError(5, "Input/output error"),
        ValueError("RESOURCE_EXHAUSTED: Out of memory"),
        RuntimeError("UNAVAILABLE: no route"),
    ],
)
def test_what_is_no_fault_of_the_files_does_not_go_back_to_an_older_step(copy, monkeypatch, error):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(ckpt.ocp.CheckpointManager, "restore", fails)
    with refused("checkpoint step 2", says="could not be read: ", fix="repair that"):
        read(copy, make_mesh())


def test_what_orbax_abandons_is_not_reported_in_addition_to_the_error(caplog, capsys):
    """Orbax closes its event loop while other reads are pending, running or failed; which of them is chance."""

    async def fails():
        raise OSError("torn")

    async def under_way():
        await asyncio.create_task(under_way())  # the last one made is never begun

    async def reads():
        await asyncio.gather(fails(), fails(), under_way())

    def run():
        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(reads())
        finally:
            loop.close()

    before = reporters()
    with refused("read"), one_report():
        try:
            run()
        except OSError as error:
            collect_abandoned(error)
            raise UserError(name="read") from error
    assert reporters() == before
    gc.collect()
    assert not caplog.records and capsys.readouterr().err == ""
    logging.getLogger("asyncio").error("something else")
    assert [record.message for record in caplog.records] == ["something else"]


def test_what_goes_on_in_threads_of_orbax_is_waited_for(caplog):
    """Another item of a failed save, which fails 0.2 s later in an event loop of its own."""
    names = {"asyncio": asyncio}
    late = "async def late():\n    await asyncio.sleep(0.2)\n    raise OSError('torn')"
    exec(compile(late, "/orbax/late.py", "exec"), names)

    async def item():
        asyncio.create_task(names["late"]())
        await asyncio.sleep(0.5)

    thread = threading.Thread(target=asyncio.run, args=(item(),))
    with one_report():
        thread.start()
        collect_abandoned(OSError("torn"))
    thread.join()
    gc.collect()
    assert not caplog.records


def reporters():
    """Everything that reports unhandled errors."""
    return sys.unraisablehook, warnings.filters[:], [logging.getLogger(name).filters[:] for name in ("asyncio", "absl")]


@pytest.mark.parametrize("how", ["flipped", *(pytest.param(how, marks=toy.SLOW) for how in ("missing", "truncated"))])
def test_reports_of_other_errors_are_restored_after_a_failure(copy, how):
    before = reporters()
    for step in (1, 2):
        damage(copy, step, "params", how)
    with refused("checkpoint directory", says="holds no whole step"):
        read(copy, make_mesh())
    assert reporters() == before


@pytest.fixture
def small_files():
    """A limit of 4,000 bytes on every file, like a full disk; JAX's cache of programs is left alone."""
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_save_that_cannot_be_written_is_one_line(tmp_path, small_files, caplog, capsys):
    """Every array fails, in threads and tasks of Orbax: none of them is reported next to the one error."""
    before = reporters()
    with refused("checkpoint directory", says="could not be written: OUT_OF_RANGE: ", fix="committed steps are intact"):
        save(tmp_path, [1])
    assert reporters() == before
    gc.collect()
    assert not caplog.records and capsys.readouterr().err == ""


def test_what_ended_a_run_is_not_hidden_by_a_save_that_failed(tmp_path, small_files, capsys):
    with pytest.raises(ZeroDivisionError), ckpt.Checkpoints(tmp_path / "checkpoints") as saver:
        saver.save(1, make_state(1).items(), {})
        raise ZeroDivisionError
    assert "ig_jax: warning: checkpoint directory" in capsys.readouterr().err


def test_an_exception_after_a_save_does_not_undo_it(tmp_path):
    with pytest.raises(ZeroDivisionError), ckpt.Checkpoints(tmp_path / "checkpoints") as saver:
        saver.save(1, make_state(1).items(), {})
        raise ZeroDivisionError
    assert (tmp_path / "checkpoints" / "1" / "commit_success.txt").exists()


def test_the_first_line_of_a_long_error_ends_in_its_cause():
    long = ValueError(f"OUT_OF_RANGE: Error {'x' * 500}: byte range [0, 2484) is not there [tensorstore_spec[1]='y']")
    assert first_line(long).startswith("OUT_OF_RANGE: Error x") and len(first_line(long)) == 200
    assert first_line(long).endswith("x: byte range [0, 2484) is not there")
    assert first_line(KeyError()) == "KeyError" and first_line(ValueError("a\nb")) == "a"


def test_a_value_that_is_not_the_one_saved_is_found(copy, capsys):
    path = copy / "checkpoints" / "2" / "meta" / "metadata"
    stored = json.loads(path.read_text())
    entry = stored["arrays"]["params"]["blocks.1.mlp.fc1.kernel"]
    entry[2] = f"{int(entry[2], 16) ^ 1:08x}"
    path.write_text(json.dumps(stored))
    assert int(read(copy, make_mesh()).step) == 1
    assert "params/blocks.1.mlp.fc1.kernel does not match its digest" in capsys.readouterr().err


def test_damage_in_another_item_does_not_keep_the_ema_from_sampling(copy):
    damage(copy, 2, "optimizer", "truncated")
    assert pretrained.load(copy).step == 2


def test_a_torn_meta_is_passed_over(copy, capsys):
    (copy / "checkpoints" / "2" / "meta" / "metadata").write_text('{"format": 1, "st')
    assert int(read(copy, make_mesh()).step) == 1
    assert "step 2 is damaged: meta" in capsys.readouterr().err


def test_when_every_step_is_damaged_nothing_starts_afresh(copy):
    for step in (1, 2):
        shutil.rmtree(copy / "checkpoints" / str(step) / "params")
    with refused("checkpoint directory", says="holds no whole step"):
        read(copy, make_mesh())


def test_an_uncommitted_step_is_not_a_fresh_start(copy):
    for step in (1, 2):
        (copy / "checkpoints" / str(step) / "commit_success.txt").unlink()
    with refused("checkpoint directory", says="holds no whole step"):
        read(copy, make_mesh())


def test_junk_that_looks_like_a_step_is_left_out(copy):
    (copy / "checkpoints" / "9").mkdir()
    (copy / "checkpoints" / "8").symlink_to(copy / "checkpoints" / "1")
    (copy / "checkpoints" / "7.bak").mkdir()
    (copy / "checkpoints" / "11").write_text("not a directory")
    assert int(read(copy, make_mesh()).step) == 2


def test_an_empty_directory_is_a_fresh_start(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert read(tmp_path, make_mesh()) is None


@pytest.mark.parametrize(
    "change,name,found",
    [
        ({"width": 64}, "params/blocks.0.attn.proj.bias", "float32 [32]"),
        ({"depth": 4}, "blocks.3", "absent"),
        ({"inter_depth": (1, 2)}, "inter_heads.1", "absent"),
    ],
)
def test_another_network_is_named_by_its_first_array(saved, change, name, found):
    other = toy.replace(toy.MODEL, **change)
    transformation = make_optimizer(EXPERIMENT.optimizer, 10, other)
    make = lambda: new_state(other, EXPERIMENT.optimizer, transformation, EXPERIMENT.ema.names, 0, {})
    layout = state_layout(make, make_mesh())
    with ckpt.Checkpoints(saved / "checkpoints", read_only=True) as reader, pytest.raises(UserError) as caught:
        restored(reader, layout)
    assert name in caught.value.name and found in caught.value.value


def test_another_dtype_is_refused_not_cast(saved):
    layout = on(make_mesh(), 0)[1]
    halved = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.bfloat16, sharding=s.sharding), layout.params)
    with ckpt.Checkpoints(saved / "checkpoints", read_only=True) as reader:
        with refused("checkpoint array params/blocks.0.attn.proj.bias", "float32 [32]", expected="bfloat16 [32]"):
            restored(reader, toy.replace(layout, params=halved))


def test_sampling_reads_the_ema_alone(saved, monkeypatch):
    """Whatever lies in the other items, only the EMA's files are opened."""
    import orbax.checkpoint as ocp

    asked = []
    restore = ocp.CheckpointManager.restore

    def spy(self, step, args):
        asked.extend(args.keys())
        return restore(self, step, args=args)

    monkeypatch.setattr(ocp.CheckpointManager, "restore", spy)
    model = pretrained.load(saved)
    assert asked == ["meta", "ema_0.999"] and model.step == 2


def test_an_ema_that_is_not_there_is_an_error(saved):
    with refused("ema", "0.5", expected="one of 0.999"):
        pretrained.load(saved, ema="0.5")


def test_a_step_can_be_named_and_renamed(copy):
    assert pretrained.load(copy / "checkpoints" / "1").step == 1
    for name in ("best", "7"):
        (copy / "checkpoints" / "1").rename(copy / name)
        model = pretrained.load(copy / name)
        assert model.step == 1 and (model.params["pos_embed"] == make_state(1).ema["0.999"]["pos_embed"]).all()
        (copy / name).rename(copy / "checkpoints" / "1")


@pytest.mark.parametrize("out", [None, "small"])
def test_a_thinned_run_samples_as_before_and_says_that_it_cannot_be_trained(copy, tmp_path, out):
    """Sizes add up; what a kill leaves between the list of arrays and their files, the next call removes."""
    size = lambda folder: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    before, path = pretrained.load(copy), tmp_path / (out or "copy")
    whole = size(copy)  # of which lists of arrays are a good part, where the network is a toy
    removed, left = thinning.thin(copy, tmp_path / out if out else None)
    model = pretrained.load(path)
    assert (model.step, model.digest) == (before.step, before.digest) and left == size(path) < 0.7 * whole
    if out:
        assert size(copy) == whole and int(read(copy, make_mesh()).step) == 2
    else:
        assert abs(whole - removed - left) < 50_000  # the lists are shorter
        shutil.copytree(path / "checkpoints" / "1" / "ema_0.999", path / "checkpoints" / "1" / "params")
        assert thinning.thin(path)[0] > 0 == thinning.thin(path)[0]
    with refused("checkpoint item", "params", fix="--config.init.checkpoint"):
        read(path, make_mesh())
