"""What the goldens of AdapterHub do not show: scopes, embeddings, heads, options, storage."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from deltamux.adapters.base import Base
from deltamux.adapters.formats.adapterhub import read_envelope
from deltamux.adapters.inspect import describe
from deltamux.adapters.kind import Lowered
from deltamux.adapters.lower import lower
from deltamux.adapters.primitives.embedding import EmbeddingRows
from deltamux.adapters.primitives.layer import Bottleneck
from deltamux.adapters.primitives.linear import Affine
from deltamux.adapters.scope import EveryPosition, PromptHead, PromptTail, Scope
from deltamux.kernels.bottleneck.op import Activation, Source
from deltamux.server.model.base import ServedBase, load_base

from .adapterhub_folders import (
    checkpoint_of,
    folder,
    lower_checkpoint,
    with_fields,
    with_tensors,
)
from .applied import Applied, check_order

NOTHING, HEAD, TAIL = 0, 1, 2


@pytest.fixture(scope="module")
def base(tiny_model: Callable[..., Path]) -> Callable[[str], ServedBase]:
    loaded: dict[str, ServedBase] = {}

    def load(family: str) -> ServedBase:
        if family not in loaded:
            loaded[family] = load_base(tiny_model(family), torch.float32)
        return loaded[family]

    return load


def lowered(name: str, base: Base) -> Lowered:
    return lower_checkpoint(checkpoint_of(folder(name)), folder(name), base)


def bottleneck(found: Lowered, part: int = 0) -> Bottleneck:
    first = found.parts[part].primitives[0]
    assert isinstance(first, Bottleneck)
    return first


def gathered_and_scattered(size: int, head: int, tail: int) -> Tensor:
    """ReftModule of adapters 1.3.0 on positions: which unit's row of which position each gets.

    A row is 10 * unit + 1000 * position, so that a row that lands elsewhere shows.
    """
    hidden = 1000 * torch.arange(size)
    adapted, real_head, real_tail = [], min(head, size), min(tail, size)
    head_index = torch.arange(real_head)
    tail_index = size + torch.arange(-real_tail, 0)
    if head:
        adapted.append(hidden.gather(0, head_index) + 10 * HEAD)
    if tail:
        adapted.append(hidden.gather(0, tail_index) + 10 * TAIL)
    rows = torch.cat(adapted)
    if head:
        hidden = hidden.scatter(0, head_index, rows[:head])
    if tail:
        hidden = hidden.scatter(0, tail_index, rows[-tail:])
    return hidden


def in_scopes(size: int, head: int, tail: int) -> Tensor:
    hidden = 1000 * torch.arange(size)
    scopes: list[tuple[int, Scope]] = []
    if head:
        scopes.append((HEAD, PromptHead(head, tail)))
    if tail:
        scopes.append((TAIL, PromptTail(tail, head)))
    for unit, scope in scopes:
        span = scope.span(list(range(size)))
        if span is not None:
            hidden[span.start : span.end] += 10 * unit
    return hidden


@pytest.mark.parametrize("head", range(5))
@pytest.mark.parametrize("tail", range(6))
def test_reft_acts_at_the_librarys_positions(head: int, tail: int) -> None:
    for size in range(1, 13):
        if head == tail == 0:
            continue
        theirs = gathered_and_scattered(size, head, tail)
        moved = (theirs // 1000 != torch.arange(size)).any()
        if moved:
            # Rows that were written to another position than theirs: only below the tail's size.
            assert head > 0
            assert size < tail
        else:
            assert in_scopes(size, head, tail).tolist() == theirs.tolist(), size


def test_reft_without_a_tail_goes_on_into_the_output() -> None:
    span = PromptHead(5, 0).span([7, 8])
    assert span is not None
    assert (span.start, span.end, span.key) == (0, 5, b"")


def test_reft_spans_that_hang_on_the_prompts_length_have_it_in_their_key() -> None:
    long, short = PromptHead(3, 2).span([1] * 9), PromptHead(3, 2).span([1] * 4)
    assert long is not None
    assert short is not None
    assert (long.end, long.key) == (3, b"")
    assert (short.end, short.key) == (2, b"4")
    assert PromptHead(3, 4).span([1] * 4) is None
    tail = PromptTail(2, 3).span([1] * 9)
    assert tail is not None
    assert (tail.start, tail.end, tail.key) == (7, 9, b"9")


def test_direft_is_served_as_it_was_trained_if_the_option_says_so(
    base: Callable[[str], ServedBase],
) -> None:
    name, served = "llama/direft", base("llama")
    saved = checkpoint_of(folder(name))
    trained = replace(saved, options={"subtract_projection": False})
    found = lower_checkpoint(trained, folder(name), served)
    unit = "model.layers.0.reft_layer.refts.foo.units.0"
    w, b = (saved.tensors[f"{unit}.learned_source.{part}"] for part in ("weight", "bias"))
    r = saved.tensors[f"{unit}.projection.weight"]
    h, residual = torch.randn(2, 7, 64)
    x = h + residual
    (part, *others) = found.parts
    assert not others
    layer = served.layout.layers[0]
    out = Applied.of(Lowered((part,)), served).half(layer, bottleneck(found).half, h, residual)
    torch.testing.assert_close(residual + out, x + functional.linear(x, w, b) @ r)
    as_reloaded = lowered(name, served)
    assert not torch.equal(bottleneck(as_reloaded).down, bottleneck(found).down)


def test_reft_with_an_activation_is_the_sum_of_two_parts_at_the_same_positions(
    base: Callable[[str], ServedBase],
) -> None:
    found = lowered("llama/noreft_relu", base("llama"))
    assert len(found.parts) == 2
    assert found.parts[0].scope == found.parts[1].scope
    first, second = bottleneck(found, 0), bottleneck(found, 1)
    assert (first.activation, second.activation) == (Activation.RELU, Activation.LINEAR)
    assert torch.equal(second.down, -second.up)
    assert torch.equal(first.up, second.up)


def test_tied_units_are_stored_once(base: Callable[[str], ServedBase]) -> None:
    head, tail = lowered("llama/noreft_tied", base("llama")).parts
    assert isinstance(head.scope, PromptHead)
    assert isinstance(tail.scope, PromptTail)
    for one, other in zip(head.primitives, tail.primitives, strict=True):
        assert one is other


@pytest.mark.parametrize("rank", [1, 3, 16, 63])
def test_an_orthogonal_projection_is_torchs(rank: int, base: Callable[[str], ServedBase]) -> None:
    torch.manual_seed(rank)
    linear = parametrizations.orthogonal(nn.Linear(64, rank, bias=False))
    state = linear.state_dict()
    original = state["parametrizations.weight.original"]
    signs = original.diagonal().clone()
    with torch.no_grad():
        noise = 0.3 * torch.randn(rank, 64)
        noise.diagonal().copy_(signs)
        linear.parametrizations.weight.original.copy_(noise)
    name = "llama/loreft_rank_4"
    saved = checkpoint_of(folder(name))
    tensors: dict[str, Tensor | None] = {}
    for unit in (0, 1):
        stem = f"model.layers.0.reft_layer.refts.foo.units.{unit}"
        for part, value in linear.state_dict().items():
            tensors[f"{stem}.projection.{part}"] = value.detach()
        tensors[f"{stem}.learned_source.weight"] = torch.randn(rank, 64)
        tensors[f"{stem}.learned_source.bias"] = torch.randn(rank)
    changed = with_fields(with_tensors(saved, tensors), r=rank)
    found = lower_checkpoint(changed, folder(name), base("llama"))
    torch.testing.assert_close(bottleneck(found).up, linear.weight.detach(), atol=1e-5, rtol=0)


def test_an_invertible_adapter_is_an_embedding_of_its_own(
    base: Callable[[str], ServedBase],
) -> None:
    path, served = folder("llama/seq_bn_inv"), base("llama")
    saved = checkpoint_of(path)
    found = lower_checkpoint(saved, path, served)
    (part,) = found.parts
    (rows,) = (each for each in part.primitives if isinstance(each, EmbeddingRows))
    assert len(part.primitives) == 1 + served.layout.num_layers
    x = served.embedding(served.layout.token_embedding)
    x1, x2 = x.chunk(2, dim=1)

    def coupling(name: str, x: Tensor) -> Tensor:
        stem = f"model.invertible_adapters.foo.{name}"
        t = saved.tensors
        inner = functional.linear(x, t[f"{stem}.0.weight"], t[f"{stem}.0.bias"]).relu()
        return functional.linear(inner, t[f"{stem}.2.weight"], t[f"{stem}.2.bias"])

    y1 = x1 + coupling("F", x2)
    torch.testing.assert_close(rows.rows, torch.cat([y1, x2 + coupling("G", y1)], dim=1))
    assert not torch.allclose(rows.rows, x, atol=0.05)


def test_mtl_lora_is_one_lora_per_task(base: Callable[[str], ServedBase]) -> None:
    path, served = folder("llama/mtl_lora"), base("llama")
    saved = checkpoint_of(path)
    found = lower_checkpoint(saved, path, served)
    check_order(found)
    inner = saved.config["config"]
    assert isinstance(inner, dict)
    applied = Applied.of(found, served)
    for each in found.parts[0].primitives:
        assert isinstance(each, Affine)
        a, b, t, w = (
            saved.tensors[f"{each.path}.loras.foo.{part}"]
            for part in ("lora_A", "lora_B", "task_specific.values", "weights")
        )
        x = torch.randn(5, each.target.in_features)
        ups = x @ a.T @ torch.diag(t) @ b.transpose(-1, -2)
        shares = (w / inner["weights_sharpness"]).exp()
        delta = (shares[:, None, None] * ups).sum(0) / shares.sum()
        y0 = functional.linear(x, *served.linear(each.target))
        y = y0 + inner["alpha"] / inner["r"] * delta
        torch.testing.assert_close(applied.linear(each.target, x), y, atol=1e-5, rtol=1e-5)


def test_a_head_equal_to_the_bases_is_dropped(base: Callable[[str], ServedBase]) -> None:
    served = base("llama")
    (part,) = lowered("llama/seq_bn_head", served).parts
    assert {type(each) for each in part.primitives} == {Bottleneck}


def test_another_head_replaces_the_bases(base: Callable[[str], ServedBase]) -> None:
    name, served = "llama/seq_bn_head", base("llama")
    saved = checkpoint_of(folder(name))
    weight = torch.randn_like(saved.head["lm_head.weight"])
    found = lower_checkpoint(replace(saved, head={"lm_head.weight": weight}), folder(name), served)
    x = torch.randn(3, 64)
    y = Applied.of(found, served).linear(served.layout.head, x)
    torch.testing.assert_close(y, x @ weight.T)


def test_another_head_of_a_tied_base_is_its_embedding_too(
    base: Callable[[str], ServedBase],
) -> None:
    name, served = "qwen2/seq_bn_head", base("qwen2")
    assert served.layout.tied_head
    saved = checkpoint_of(folder(name))
    weight = torch.randn_like(saved.head["lm_head.weight"])
    found = lower_checkpoint(replace(saved, head={"lm_head.weight": weight}), folder(name), served)
    applied = Applied.of(found, served)
    x = torch.randn(3, 64)
    torch.testing.assert_close(applied.linear(served.layout.head, x), x @ weight.T)
    rows = applied.embedding(served.layout.token_embedding, torch.tensor([4, 299]))
    torch.testing.assert_close(rows, weight[[4, 299]])


def test_shared_matrices_lie_on_the_device_once(base: Callable[[str], ServedBase]) -> None:
    (part,) = lowered("llama/vera_kv", base("llama")).parts
    factors = {id(each.a) for each in part.primitives if isinstance(each, Affine)}
    assert len(part.primitives) == 4
    assert len(factors) == 1


def test_identities_of_a_second_residual_lie_on_the_device_once(
    base: Callable[[str], ServedBase],
) -> None:
    main, extra = lowered("llama/seq_bn_second_residual", base("llama")).parts
    assert main.scope == extra.scope == EveryPosition()
    stored = {id(tensor) for each in extra.primitives for tensor in each.tensors}
    assert len(extra.primitives) == 2
    assert len(stored) == 1
    assert bottleneck(Lowered((extra,))).source is Source.RESIDUAL


@pytest.mark.parametrize("name", ["gpt2/lora_kv", "llama/mam", "qwen3/dora", "gpt2/union_two_bn"])
def test_primitives_stand_in_the_order_of_their_places(
    name: str, base: Callable[[str], ServedBase]
) -> None:
    check_order(lowered(name, base(name.split("/")[0])))


def test_bf16_is_cast_once(tiny_model: Callable[..., Path]) -> None:
    served = load_base(tiny_model("llama"), torch.bfloat16)
    exact = lowered("llama/scaled_par_bn", load_base(tiny_model("llama"), torch.float32))
    rounded = lowered("llama/scaled_par_bn", served)
    for one, other in zip(exact.parts[0].primitives, rounded.parts[0].primitives, strict=True):
        for full, half in zip(one.tensors, other.tensors, strict=True):
            assert half.dtype is torch.bfloat16
            assert torch.equal(full.to(torch.bfloat16), half)


@pytest.mark.parametrize(
    ("version", "ignored"),
    [
        ("adapters.1.0.1", True),
        ("adapters.0.2.0", True),
        ("adapters.1.1.0.dev0", True),
        ("adapters.1.1.0rc1", True),
        ("adapters.1.1.0", False),
        ("adapters.1.1.0.post1", False),
        ("adapters.1.3.0", False),
        ("adapters.2.0", False),
        ("3.2.1", False),
    ],
)
def test_alpha_of_old_versions_is_r(version: str, ignored: bool) -> None:
    saved = checkpoint_of(folder("llama/lora"))
    changed = replace(saved, config={**saved.config, "version": version})
    assert read_envelope(changed).alpha_is_rank is ignored


def test_alpha_of_an_old_union_is_left_alone() -> None:
    saved = checkpoint_of(folder("llama/union_lora_seq_bn"))
    changed = replace(saved, config={**saved.config, "version": "adapters.1.0.1"})
    assert read_envelope(changed).alpha_is_rank is False


def test_an_adapter_saved_from_a_model_without_a_head_is_the_same(
    base: Callable[[str], ServedBase],
) -> None:
    for name, stem in (("llama/vera", "model."), ("gpt2/lora", "transformer.")):
        family, saved = name.split("/")[0], checkpoint_of(folder(name))
        bare = {each.removeprefix(stem): tensor for each, tensor in saved.tensors.items()}
        assert bare.keys() != saved.tensors.keys()
        found = lower_checkpoint(replace(saved, tensors=bare), folder(name), base(family))
        wanted = lowered(name, base(family))
        for one, other in zip(found.parts[0].primitives, wanted.parts[0].primitives, strict=True):
            assert one.path == other.path
            assert all(map(torch.equal, one.tensors, other.tensors))


@pytest.mark.parametrize(
    "name",
    [
        "llama/seq_bn",
        "llama/compacter",
        "llama/seq_bn_second_residual",
        "llama/dora",
        "llama/vera_kv",
        "llama/ia3",
        "llama/mam",
        "llama/noreft_relu",
        "llama/noreft_suffix",
        "llama/noreft_tied",
        "llama/loreft_rank_4",
    ],
)
def test_what_is_told_without_a_base_is_what_is_stored(
    name: str, base: Callable[[str], ServedBase]
) -> None:
    adapter = lower(folder(name), base("llama"), 1 << 30)
    told = describe(folder(name))
    assert told.num_parameters == adapter.num_elements
    assert told.ranks == tuple(
        sorted({each.rank for each in adapter.primitives if isinstance(each, Affine) and each.rank})
    )
