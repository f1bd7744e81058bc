"""Settings left open to the machine: remat, micro-batches and the groups that share a state."""

import functools

import jax
import pytest
import toy
from refusal import refused

from ig_jax.models import zoo
from ig_jax.models.dit import DiTConfig
from ig_jax.optim.optimizer import make_optimizer
from ig_jax.parallel.hardware import chip_of
from ig_jax.parallel.mesh import make_mesh
from ig_jax.parallel.sharding import replicated
from ig_jax.training import memory
from ig_jax.training.memory import Fit
from ig_jax.training.state import new_state, state_layout

GB = 10**9
XL = DiTConfig(
    **zoo.named("SiT-XL/2"),
    input_size=32,
    channels=4,
    num_classes=1000,
    dtype="bfloat16",
    scan_blocks=False,
    remat="auto",
    attention="xla",
)


def layout(mesh, model=XL):
    e = toy.experiment()
    new = functools.partial(new_state, model, e.optimizer, make_optimizer(e.optimizer, 1, model), ("0.9999",), 0)
    return state_layout(lambda: new({}), mesh)


def fitted(monkeypatch, limit, batch, *, model=XL, accumulate=-1, inputs=0, **axes):
    """inputs: bytes of a batch and its encoder on every device."""
    monkeypatch.setattr(memory, "usable_memory", lambda device: limit)
    mesh = make_mesh(**axes)
    given = jax.ShapeDtypeStruct((inputs,), "uint8", sharding=replicated(mesh))
    return memory.fitted(model, accumulate, layout(mesh), given, mesh, batch)


def test_a_roomy_device_keeps_everything_in_one_part(monkeypatch):
    assert fitted(monkeypatch, 1000 * GB, 256) == Fit("none", 1)


def test_with_less_room_it_recomputes_what_is_cheap_then_takes_smaller_parts_then_recomputes_all(monkeypatch):
    fits = [fitted(monkeypatch, limit * GB, 256) for limit in (50, 36, 24, 1)]
    assert fits == [Fit("none", 1), Fit("dots", 1), Fit("dots", 2), Fit("full", 2)]  # the last needs least, and is over
    asked = [memory.activation_bytes(toy.replace(XL, remat=f.remat), 32 // f.accumulate, make_mesh()) for f in fits]
    assert asked == sorted(asked, reverse=True)


def test_a_state_that_is_cut_leaves_room_for_activations(monkeypatch):
    assert fitted(monkeypatch, 36 * GB, 256, data=1, fsdp=8) == Fit("none", 1)
    assert fitted(monkeypatch, 36 * GB, 256, data=8) != Fit("none", 1)


def test_an_encoder_in_the_step_takes_its_room(monkeypatch):
    assert fitted(monkeypatch, 50 * GB, 256) == Fit("none", 1)
    assert fitted(monkeypatch, 50 * GB, 256, inputs=14 * GB) == fitted(monkeypatch, 36 * GB, 256)


def test_what_the_config_says_is_taken(monkeypatch):
    fixed = toy.replace(XL, remat="dots")
    assert fitted(monkeypatch, 1000 * GB, 256, model=fixed, accumulate=4) == Fit("dots", 4)
    assert fitted(monkeypatch, 1 * GB, 256, model=fixed, accumulate=4) == Fit("dots", 4)


def test_two_gpus_of_one_name_have_each_its_own_memory():
    kinds = (
        "NVIDIA A100-SXM4-40GB",
        "NVIDIA A100-PCIE-40GB",
        "NVIDIA A100-SXM4-80GB",
        "NVIDIA A100 80GB PCIe",
        "NVIDIA A100",
    )
    assert [chip_of(kind).memory // GB for kind in kinds] == [40, 40, 80, 80, 80]
    assert chip_of("cpu") is None


def test_a_machine_of_unknown_memory_recomputes_nothing():
    mesh = make_mesh()
    assert memory.fitted(XL, -1, layout(mesh), {}, mesh, 256) == Fit("none", 1)


@pytest.mark.parametrize("devices,shape", [(1, (1, 1)), (2, (1, 2)), (6, (2, 3)), (8, (2, 4))])
def test_groups_are_the_largest_that_divide_the_devices(devices, shape):
    mesh = make_mesh(fsdp_up_to=5, devices=jax.devices()[:devices])
    assert (mesh.shape["data"], mesh.shape["fsdp"]) == shape


def test_groups_leave_what_is_asked_for_to_data_and_tensor():
    assert dict(make_mesh(tensor=2, fsdp_up_to=3).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(data=4, fsdp_up_to=16).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert make_mesh(fsdp=2, fsdp_up_to=16).shape["fsdp"] == 2


def test_a_tensor_size_that_does_not_divide_is_refused():
    with refused("mesh", expected="multiply to the 8 devices"):
        make_mesh(tensor=3, fsdp_up_to=16)
