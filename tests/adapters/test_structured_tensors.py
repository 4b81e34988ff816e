"""Tensors of structured kinds that PEFT would not write, or could not compute with, are refused."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deltamux.adapters.errors import (
    AdapterCorrupt,
    AdapterError,
    AdapterMismatch,
    AdapterUnsupported,
)

from .structured import CASES, Saved

Load = Callable[[str], Saved]


@pytest.fixture(scope="module")
def load(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Load:
    """``Saved.of`` by the name of the case, each made once."""

    @cache
    def get(name: str) -> Saved:
        return Saved.of(name, tiny_model(CASES[name].family), tmp_path_factory.mktemp("adapter"))

    return get


def test_a_whole_and_a_factored_kronecker_factor_contradict_each_other(load: Load) -> None:
    saved = load("lokr, both factored")
    name, tensor = saved.find("lokr_w1_a")
    whole = name.removesuffix("_a")
    with pytest.raises(AdapterCorrupt, match="both whole and as a product"):
        saved.lower(tensors=saved.with_tensor(whole, tensor))


def test_copies_of_the_random_bases_must_be_equal(load: Load) -> None:
    saved = load("randlora")
    name, tensor = saved.find("q_proj.randlora_A")
    assert len([n for n in saved.checkpoint.tensors if n.endswith("randlora_A")]) == 7
    with pytest.raises(AdapterCorrupt, match="another randlora_A"):
        saved.lower(tensors=saved.with_tensor(name, tensor + 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda indices: indices.int() - 1, "outside the vector bank"),
        (lambda indices: indices.int() + 19, "outside the vector bank"),
        (lambda indices: indices[..., :1].expand_as(indices).contiguous(), "names a vector twice"),
        (lambda indices: indices.float(), "of torch.float32"),
    ],
)
def test_indices_of_vectors_are_checked(
    change: Callable[[Tensor], Tensor], message: str, load: Load
) -> None:
    saved = load("vblora, topk")
    name, tensor = saved.find("_topk_indices")
    tensor = tensor.clone()
    tensor[0, 0, 0] = 0
    tensor[0, 0, 1:] = torch.tensor([1, 2, 3])
    with pytest.raises(AdapterCorrupt, match=message):
        saved.lower(tensors=saved.with_tensor(name, change(tensor)))


@pytest.mark.parametrize("value", [-0.5, 1.5])
def test_weights_of_vectors_must_be_a_mixture(value: float, load: Load) -> None:
    saved = load("vblora, topk")
    name, tensor = saved.find("_topk_weights")
    with pytest.raises(AdapterCorrupt, match="no mixture"):
        saved.lower(tensors=saved.with_tensor(name, torch.full_like(tensor, value)))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda indices: indices - 1, AdapterCorrupt),
        (lambda indices: indices.float() + 0.5, AdapterCorrupt),
        (lambda indices: indices + 64, AdapterMismatch),
    ],
)
def test_sparse_indices_are_checked(
    change: Callable[[Tensor], Tensor], error: type[AdapterError], load: Load
) -> None:
    saved = load("shira")
    name, tensor = saved.find("q_proj.shira_indices")
    tensor = tensor.clone()
    tensor[:, 0] = 0
    with pytest.raises(error):
        saved.lower(tensors=saved.with_tensor(name, change(tensor)))


@pytest.mark.parametrize(("name", "most"), [("vera, drawn", 190), ("vblora", 4095), ("hra", 4095)])
def test_a_huge_rank_takes_no_more_than_whole_matrices(name: str, most: int, load: Load) -> None:
    saved = load(name)
    rank = saved.checkpoint.config["r"]
    wide = {
        path: torch.cat([tensor] * (most // rank), dim=tensor.shape.index(rank))
        if rank in tensor.shape
        else tensor
        for path, tensor in saved.checkpoint.tensors.items()
    }
    (part,) = saved.lower(tensors=wide, r=most // rank * rank).parts
    for primitive in part.primitives:
        target = saved.base.layout.targets[primitive.path]
        stored = sum(tensor.numel() for tensor in primitive.tensors)
        assert stored <= target.in_features * target.out_features


@pytest.mark.parametrize("name", ["hra", "hra, Gram-Schmidt"])
def test_a_reflection_at_nothing_is_corrupt(name: str, load: Load) -> None:
    saved = load(name)
    path, tensor = saved.find("hra_u")
    tensor = tensor.clone()
    tensor[:, 1] = 0
    with pytest.raises(AdapterCorrupt, match="column of zeros"):
        saved.lower(tensors=saved.with_tensor(path, tensor))


def test_dependent_columns_have_no_gram_schmidt(load: Load) -> None:
    saved = load("hra, Gram-Schmidt")
    path, tensor = saved.find("hra_u")
    tensor = tensor.clone()
    tensor[:, 3] = tensor[:, 0] - 2 * tensor[:, 2]
    with pytest.raises(AdapterCorrupt, match="depend on each other"):
        saved.lower(tensors=saved.with_tensor(path, tensor))
    assert saved.lower(tensors=saved.with_tensor(path, tensor), apply_GS=False)


@pytest.mark.parametrize(
    "name", ["loha", "lokr, whole", "vera", "hra", "oft", "boft", "c3a, pattern"]
)
def test_numbers_that_overflow_are_refused(name: str, load: Load) -> None:
    saved = load(name)
    path, tensor = next(iter(saved.checkpoint.tensors.items()))
    huge = {path: torch.full_like(tensor.double(), 1e300)}
    if name == "boft":  # a rotation has no size, its scale has
        path, tensor = saved.find("boft_s")
        huge = {path: torch.full_like(tensor.double(), 1e300)}
    if name == "hra":  # only directions count
        assert saved.lower(tensors={**saved.checkpoint.tensors, **huge})
    else:
        with pytest.raises(AdapterUnsupported, match="overflows"):
            saved.lower(tensors={**saved.checkpoint.tensors, **huge})
