"""Memory of batches is used again, and never while anything still refers to it."""

import gc

import jax
import numpy as np

from ig_jax.data.buffers import Buffers

SHAPE = (64, 32, 4)


def address(array):
    return array.__array_interface__["data"][0]


def test_memory_comes_back_when_the_last_reference_is_gone():
    buffers = Buffers()
    first = buffers.empty(SHAPE, np.dtype(np.float32))
    assert first.shape == SHAPE and first.flags.c_contiguous and first.flags.writeable
    place, part = address(first), first.reshape(-1)[5:].view(np.uint8)
    first[:] = 7
    del first
    gc.collect()
    other = buffers.empty(SHAPE, np.dtype(np.float32))  # `part` still refers to the first
    other[:] = 1
    assert address(other) != place and (part.view(np.float32) == 7).all()
    del part
    assert address(buffers.empty(SHAPE, np.dtype(np.float32))) == place
    assert address(buffers.empty((3,), np.dtype(np.float32))) != place  # another size


def test_device_arrays_keep_their_numbers():
    """JAX may use the memory of a host array as it is."""
    buffers = Buffers()
    on_device = []
    for number in range(8):
        array = buffers.empty(SHAPE, np.dtype(np.float32))
        array[:] = number
        on_device.append(jax.device_put(array, jax.devices()[0]))
        del array
    for number, found in enumerate(on_device):
        np.testing.assert_array_equal(np.asarray(found), np.full(SHAPE, number, np.float32))
