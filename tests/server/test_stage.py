"""The way of a step's arrays to the device, on memory of the host in the device's place."""

import random

import numpy as np
import pytest
import torch

from deltamux.server.runner.graphs import decode_buckets
from deltamux.server.runner.stage import HostStage, PinnedStage, Stage, make_stage

ARRAYS = [
    np.arange(5, dtype=np.int64),
    np.array([[1, 2, 3]], dtype=np.int32),
    np.array([], dtype=np.float32),
    np.array([0.5, -2.0, np.inf], dtype=np.float32),
    np.array([1.0], dtype=np.float64),
    np.arange(12, dtype=np.int32).reshape(3, 4)[:, ::2],
]


def pinned(num_bytes: int) -> PinnedStage:
    twin = torch.full((num_bytes,), 0xFF, dtype=torch.uint8)
    return PinnedStage(np.full(num_bytes, 0xFF, dtype=np.uint8), twin)


@pytest.fixture(params=[HostStage(), pinned(4096), pinned(100)], ids=["host", "pinned", "small"])
def stage(request) -> Stage:
    return request.param


def test_arrays_arrive_whole_whatever_their_sizes(stage):
    """Over several steps; what does not fit arrives too."""
    for _ in range(3):
        stage.begin()
        placed = [stage.place(array) for array in ARRAYS]
        stage.flush()
        for array, tensor in zip(ARRAYS, placed, strict=True):
            assert tensor.shape == array.shape
            assert np.array_equal(tensor.numpy(), array)


def test_later_arrays_leave_what_was_sent(stage):
    stage.begin()
    first = stage.place(np.array([1, 2, 3], dtype=np.int64))
    stage.flush()
    second = stage.place(np.array([4], dtype=np.int64))
    stage.flush()
    stage.flush()
    assert (first.tolist(), second.tolist()) == ([1, 2, 3], [4])


def test_steps_of_equal_sizes_lie_at_the_same_addresses():
    stage = pinned(4096)
    addresses = []
    for _ in range(2):
        stage.begin()
        stage.place(np.zeros(random.Random(1).randint(1, 40), dtype=np.int64))
        addresses.append(stage.place(np.ones(3, dtype=np.float32)).data_ptr())
    assert addresses[0] == addresses[1]
    assert addresses[0] % 64 == stage.place(np.ones(1, dtype=np.int64)).data_ptr() % 64


def test_a_host_needs_no_copy():
    array = np.arange(3)
    assert make_stage(torch.device("cpu"), 0).place(array).data_ptr() == array.ctypes.data


@pytest.mark.parametrize(
    ("sequences", "buckets"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (3, (1, 2, 4)),
        (8, (1, 2, 4, 8)),
        (9, (1, 2, 4, 8, 16)),
        (30, (1, 2, 4, 8, 16, 24, 32)),
    ],
)
def test_buckets_end_with_the_first_that_holds_all(sequences, buckets):
    assert decode_buckets(sequences) == buckets
