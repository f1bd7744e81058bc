"""The choice of a kernel by hardware, and each kernel against the plain form."""

import dataclasses
import logging
import types

import jax
import jax.numpy as jnp
import pytest
import toy
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from refusal import refused

from ig_jax.models import cpu, dit, kernels
from ig_jax.parallel.mesh import AXES
from ig_jax.parallel.sharding import platform


def mesh_of(name, kind, data=2):
    """A mesh of devices that do not exist."""
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=name)
    return AbstractMesh((data, 1, 1), AXES, (AxisType.Auto,) * 3, abstract_device=device)


H200, V5E = mesh_of("gpu", "NVIDIA H200"), mesh_of("tpu", "TPU v5 lite")
BFLOAT16 = dataclasses.replace(toy.MODEL, dtype="bfloat16")  # heads of 16


@pytest.fixture
def cudnn(request, monkeypatch):
    """A version of cuDNN for JAX to find here, or none."""
    version = None if request.param is None else types.SimpleNamespace(cudnn_get_version=lambda: request.param)
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", version)
    kernels._cudnn_error.cache_clear(), kernels._warn_once.cache_clear()
    yield
    kernels._cudnn_error.cache_clear(), kernels._warn_once.cache_clear()


with_cudnn = pytest.mark.parametrize("cudnn", [90800], indirect=True)
without_cudnn = pytest.mark.parametrize("cudnn", [None], indirect=True)


def traced(config, mesh, until=lambda traced: traced.jaxpr):
    """The gradient of a network traced for `mesh`, as text."""
    array = jax.ShapeDtypeStruct
    args = (array((4, 8, 8, 1), "float32"), array((4,), "float32"), array((4,), "int32"))

    def loss(params):
        with jax.sharding.use_abstract_mesh(mesh):
            return jnp.mean(dit.apply(config, params, *[jnp.zeros(a.shape, a.dtype) for a in args]).final ** 2)

    return str(until(jax.jit(jax.grad(loss)).trace(dit.shapes(config))))


@pytest.mark.parametrize(
    "name,kind,wanted",
    [
        ("cpu", "cpu", "cpu"),
        ("gpu", "NVIDIA H200", "cuda"),
        ("cuda", "NVIDIA H200", "cuda"),
        ("gpu", "AMD Instinct MI300X", "rocm"),
        ("tpu", "TPU v5 lite", "tpu"),
    ],
)
def test_the_platform_is_that_of_the_mesh(name, kind, wanted):
    assert platform() == "cpu"
    with jax.sharding.use_abstract_mesh(mesh_of(name, kind)):
        assert platform() == wanted


@with_cudnn
@pytest.mark.parametrize(
    "wanted,where,dtype,head_dim,kernel",
    [
        ("auto", "cpu", "bfloat16", 64, "cpu"),
        ("auto", "tpu", "bfloat16", 64, "xla"),
        ("auto", "rocm", "bfloat16", 64, "xla"),
        ("auto", "cuda", "bfloat16", 72, "cudnn"),
        ("auto", "cuda", "bfloat16", 128, "cudnn"),
        ("auto", "cuda", "bfloat16", 136, "xla"),
        ("auto", "cuda", "bfloat16", 36, "xla"),
        ("auto", "cuda", "float32", 64, "xla"),
        ("cudnn", "cuda", "bfloat16", 64, "cudnn"),
        ("xla", "cuda", "bfloat16", 64, "xla"),
        ("xla", "cpu", "float32", 64, "xla"),
    ],
)
def test_the_kernel_is_chosen_by_platform_dtype_and_head(cudnn, wanted, where, dtype, head_dim, kernel):
    assert kernels.attention_kernel(wanted, platform=where, dtype=dtype, head_dim=head_dim) == kernel


@with_cudnn
@pytest.mark.parametrize(
    "where,dtype,head_dim",
    [("cpu", "bfloat16", 64), ("tpu", "bfloat16", 64), ("cuda", "float32", 64), ("cuda", "bfloat16", 36)],
)
def test_cudnn_by_name_is_refused_where_it_cannot_be(cudnn, where, dtype, head_dim):
    with refused("attention", "cudnn", expected=f"auto or xla for {dtype}, heads of {head_dim} and {where}"):
        kernels.attention_kernel("cudnn", platform=where, dtype=dtype, head_dim=head_dim)


@without_cudnn
def test_a_missing_cudnn_is_reported_once_and_refused_by_name(cudnn, caplog):
    choose = dict(platform="cuda", dtype="bfloat16", head_dim=64)
    with caplog.at_level(logging.WARNING):
        assert [kernels.attention_kernel("auto", **choose) for _ in range(2)] == ["xla", "xla"]
    assert [record.message for record in caplog.records] == [
        "attention='auto' takes XLA's kernel, the slower one on CUDA: cuDNN is not detected."
    ]
    with refused("attention", "cudnn", expected="auto or xla on this machine", fix="brings cuDNN"):
        kernels.attention_kernel("cudnn", **choose)


@with_cudnn
def test_a_network_for_cuda_runs_cudnn_forward_and_backward_and_nothing_of_a_cpu(cudnn):
    text = traced(BFLOAT16, H200)
    assert text.count("attention_fwd_wrapper") == text.count("attention_bwd_wrapper") == BFLOAT16.depth
    assert "platform_index" not in text and "reduce_max" not in text  # no branch, no second softmax
    for config in (toy.MODEL, dataclasses.replace(BFLOAT16, attention="xla")):
        assert "attention_fwd" not in traced(config, H200) and "reduce_max" in traced(config, H200)
    assert "attention_fwd" not in traced(BFLOAT16, V5E)
    with refused("attention", "cudnn", expected="heads of 16 and tpu"):
        traced(dataclasses.replace(BFLOAT16, attention="cudnn"), V5E)


@with_cudnn
def test_a_network_for_cuda_lowers_to_the_calls_of_cudnn(cudnn):
    lowered = traced(BFLOAT16, H200, lambda traced: traced.lower(lowering_platforms=("cuda",)).as_text())
    assert lowered.count("@__cudnn$fmhaSoftmax(") == lowered.count("@__cudnn$fmhaSoftmaxBackward(") == BFLOAT16.depth


def value_and_gradients(function, *args):
    """function(*args), the same under a derivative, and its gradients along a fixed direction, all in float32."""
    out, pull = jax.vjp(function, *args)
    direction = jax.random.normal(jax.random.key(9), out.shape).astype(out.dtype)
    return [x.astype(jnp.float32) for x in (function(*args), out, *pull(direction))]


def relative(got, want):
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


@pytest.mark.parametrize("one_cpu", [True, False])
@pytest.mark.parametrize("dtype,bound", [("float32", 1e-6), ("bfloat16", 6e-3)])
def test_attention_on_a_cpu_is_the_plain_form(monkeypatch, dtype, bound, one_cpu):
    monkeypatch.setattr(cpu, "on_one_cpu", lambda: one_cpu)
    q, k, v = (2 * jax.random.normal(key, (3, 20, 2, 8)) for key in jax.random.split(jax.random.key(0), 3))
    given = [x.astype(dtype) for x in (q, k, v)]
    want = value_and_gradients(jax.nn.dot_product_attention, *(x.astype(jnp.float32) for x in given))
    got = value_and_gradients(kernels.attention, *given)
    assert max(map(relative, got, want)) < bound


def test_attention_on_a_cpu_survives_large_scores():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 8, 1, 16))
    args = q, k + 100, v  # scores of hundreds, whose exponential alone is infinite
    got, want = (value_and_gradients(f, *args) for f in (kernels.attention, jax.nn.dot_product_attention))
    assert max(map(relative, got, want)) < 1e-3


def test_heads_are_split_and_put_together_again():
    qkv = jax.random.normal(jax.random.key(0), (2, 5, 3 * 4 * 6))
    plain = lambda qkv: jnp.stack([x.reshape(2, 5, 4, 6) for x in jnp.split(qkv, 3, axis=-1)])
    split = lambda qkv: jnp.stack(kernels.split_heads(qkv, 4))
    for got, want in zip(value_and_gradients(split, qkv), value_and_gradients(plain, qkv)):
        assert (got == want).all()
