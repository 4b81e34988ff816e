"""Corrections away from linear modules: embeddings, norms, bottlenecks and side attention.

Both kinds of kernels are held to the reference, which ``test_row_references.py`` is about.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from transformers.activations import ACT2FN

from deltamux.kernels.backend import Backend
from deltamux.kernels.bottleneck.op import Activation, Cell, Source

from .compare import assert_close, same_bits
from .pools import GAP, NAN, Pool, segments_of
from .row_cases import (
    ACT_NAMES,
    EMPTY,
    EPS,
    EVERY,
    GROUPS,
    OUTSIDE,
    PLACE,
    ROWS,
    SLOTS,
    VOCAB,
    Case,
    Group,
    MakeCase,
    bottleneck_case,
    centered_case,
    embedding_case,
    norm_case,
    numbers,
    rows_case,
    side_case,
    sum_case,
)

HUGE = 1 << 40


@pytest.fixture(params=EVERY, ids=lambda make: make.__name__)
def make_case(request: pytest.FixtureRequest) -> MakeCase:
    return request.param


BACKENDS = ("compiled", "interpreted")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    # The interpreter computes by numpy, which would warn of infinities and NaN.
    with np.errstate(all="ignore"):
        yield request.getfixturevalue(request.param)


@pytest.fixture(params=[1, 2])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(threads)


def each_backend(
    names: str, compiled: Sequence[Any], interpreted: Sequence[Any]
) -> pytest.MarkDecorator:
    """Parametrizes over both with cases of their own: the interpreter is slow."""
    cases = [
        (name, *(case if isinstance(case, tuple) else (case,)))
        for name, of_it in zip(BACKENDS, (compiled, interpreted), strict=True)
        for case in of_it
    ]
    return pytest.mark.parametrize(("backend", *names.split()), cases, indirect=["backend"])


def check(case: Case, backend: Backend, reference: Backend, magnitude: float) -> None:
    """Within ``magnitude``'s tolerance of the reference in float32, on every row."""
    assert_close(case.run(backend), case.wide().run(reference), magnitude)


@each_backend("hidden width", list(product((33, 64, 576), (1, 7, 48))), [(33, 7), (130, 48)])
@pytest.mark.parametrize("source", Source)
def test_bottleneck_shapes(
    backend: Backend,
    reference: Backend,
    dtype: torch.dtype,
    hidden: int,
    width: int,
    source: Source,
) -> None:
    case = bottleneck_case(dtype, hidden, width, source=source)
    exact = case.wide()
    if source is Source.SUM:  # the sum is of the dtype, so that here nothing is left to round
        h, r = case.inputs
        exact = replace(exact, inputs=((h + r).float(), torch.zeros_like(exact.inputs[1])))
    assert_close(case.run(backend), exact.run(reference), magnitude=20.0)


@pytest.mark.parametrize("activation", Activation)
@each_backend("scale", [0.01, 1.0, 30.0], [1.0])
def test_activations(
    backend: Backend, reference: Backend, dtype: torch.dtype, activation: Activation, scale: float
) -> None:
    case = bottleneck_case(dtype, 64, 48, activation)
    case = replace(case, inputs=tuple(each * scale for each in case.inputs))
    degree = 2 if activation is Activation.RELU_SQUARED else 1
    check(case, backend, reference, 10 * max(1.0, scale) ** degree)


@pytest.mark.parametrize(("activation", "name"), ACT_NAMES)
def test_activations_at_their_limits(backend: Backend, activation: Activation, name: str) -> None:
    """One column through the identity, so that the activation itself is seen.

    The tails of gelu fall as exp(-x²/2), which multiplies a rounding of x by x².
    """
    points = torch.tensor([0.0, 1e-20, 1e-3, 0.624, 0.626, 1, 3, 5.9, 6, 9, 40, 86, 88, 1e4, 3e30])
    z = torch.cat((points, -points))[:, None]
    pool = Pool(torch.float32)
    one = torch.ones(1, 1)
    cell = Cell(1, activation, Source.OUTPUT, pool.put(one), pool.put(one))
    table = pool.table(1, 1, {(0, 0): cell})
    case = Case(torch.zeros_like(z), (z, z), table, bottleneck_case(torch.float32).apply)
    out = case.run(backend, [(0, len(z), 0, 1.0)])
    exact = ACT2FN[name](z.double()).float().double()  # what float32 cannot hold is infinite
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-17)


@each_backend("hidden", [576], [66])
def test_bottleneck_in_place(
    backend: Backend, reference: Backend, dtype: torch.dtype, hidden: int
) -> None:
    """``out`` may be the very tensor that is read."""
    for source in Source:
        case = bottleneck_case(dtype, hidden, 48, source=source)
        apart = replace(case, out=case.inputs[0])
        for tested in (backend, reference):
            expected = apart.run(tested)
            out = case.inputs[0].clone()
            case.apply(tested, out, (out, case.inputs[1]), case.table, segments_of(GROUPS))
            assert same_bits(out, expected)


@each_backend(
    "heads kv_heads head_dim length",
    [
        (6, 2, 20, 11),
        (9, 3, 64, 10),
        (4, 4, 7, 1),
        (14, 2, 64, 300),
        (5, 1, 80, 12),
        (1, 1, 33, 16),
    ],
    [(6, 2, 20, 11), (4, 4, 7, 1), (14, 2, 64, 20), (1, 1, 33, 16)],
)
def test_side_attention_shapes(
    backend: Backend,
    reference: Backend,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    length: int,
) -> None:
    check(side_case(dtype, heads, kv_heads, head_dim, length), backend, reference, 10.0)


def test_side_attention_with_large_scores(
    backend: Backend, reference: Backend, dtype: torch.dtype
) -> None:
    case = side_case(dtype, head_dim=64)
    numbers = case.table.numbers.round()  # whole numbers, so that float32 holds every score exactly
    query = (case.inputs[0] * 100).round()
    check(
        replace(case, inputs=(query,), table=replace(case.table, numbers=numbers)),
        backend,
        reference,
        10.0,
    )


@each_backend(
    "shape",
    [((576,),), ((60,),), ((2,),), ((33,),), ((3, 64),), ((9, 20),)],
    [((33,),), ((9, 20),)],
)
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_norm_shapes(
    backend: Backend,
    reference: Backend,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    centered: bool,
    bias: bool,
) -> None:
    """Both round as often, so that one differs by a unit of the largest where the other ties."""
    case = norm_case(dtype, shape, centered, bias)
    actual, expected = case.run(backend).float(), case.run(reference).float()
    largest_bias = case.table.numbers.float().nan_to_num().abs().max() if bias else 0.0
    unit = 2.0**-7 if dtype is torch.bfloat16 else 1e-5
    assert ((actual - expected).abs() <= unit * (expected.abs() + largest_bias) + 1e-6).all()


def test_norm_with_the_bases_weight_has_the_bases_bits(
    backend: Backend, dtype: torch.dtype
) -> None:
    for shape in ((576,), (33,), (3, 64)):
        case = norm_case(dtype, shape, bias=False)
        weight, _ = case.table.cells[PLACE, 0].tolist()
        base = backend.rms_norm(case.inputs[0], numbers(case, weight, shape[-1]), EPS)
        assert same_bits(case.run(backend, [(0, ROWS, 0, 1.0)]), base)


@each_backend("hidden", [576, 64, 33, 1], [576, 1])
def test_rows_are_copied(
    backend: Backend, reference: Backend, dtype: torch.dtype, hidden: int
) -> None:
    case = rows_case(dtype, hidden)
    assert same_bits(case.run(backend), case.run(reference))


@each_backend("hidden rank", list(product((576, 64, 33), (1, 7, 48))), [(300, 48), (33, 1)])
def test_embedding_shapes(
    backend: Backend, reference: Backend, dtype: torch.dtype, hidden: int, rank: int
) -> None:
    check(embedding_case(dtype, hidden, rank), backend, reference, 4.0 * rank)


# ---- what holds for every one


def test_only_rows_of_segments_with_a_cell_change(
    backend: Backend, reference: Backend, dtype: torch.dtype, make_case: MakeCase
) -> None:
    case = make_case(dtype)
    groups = [*GROUPS[:2], (4, 6, EMPTY, 1.0), *GROUPS[2:]]
    for tested in (backend, reference):
        out = case.run(tested, groups)
        changed = (out != case.out).flatten(1).any(1)
        assert not changed[OUTSIDE].any()
        assert changed[[0, *range(6, 43)]].float().mean() > 0.8
        # what their rows hold is not looked at
        inputs = [each.clone() for each in case.inputs]
        for each in inputs:
            each[OUTSIDE] = NAN if each.is_floating_point() else -HUGE
        again = replace(case, inputs=tuple(inputs)).run(tested, groups)
        assert same_bits(again, out)


@pytest.mark.usefixtures("_threads")
def test_a_row_has_the_same_bits_alone_and_in_any_company(
    compiled: Backend, dtype: torch.dtype, make_case: MakeCase
) -> None:
    case = make_case(dtype)
    together = case.run(compiled)
    for start, end, slot, weight in GROUPS:
        for row in range(start, end):
            alone = case.rows(slice(row, row + 1)).run(compiled, [(0, 1, slot, weight)])
            assert same_bits(alone, together[row : row + 1])


@pytest.mark.parametrize("rows", [2, 3, 4, 5, 31, 33, 45])
def test_wide_rows_have_the_same_bits_in_every_tile(
    compiled: Backend, dtype: torch.dtype, rows: int
) -> None:
    for case in (
        bottleneck_case(dtype, 576, 48, source=Source.SUM),
        embedding_case(dtype, 576, 48),
    ):
        one_by_one = torch.cat(
            [case.rows(slice(i, i + 1)).run(compiled, [(0, 1, 3, 0.7)]) for i in range(rows)]
        )
        together = case.rows(slice(0, rows)).run(compiled, [(0, rows, 3, 0.7)])
        assert same_bits(together, one_by_one)


@pytest.mark.parametrize("make", [bottleneck_case, sum_case, side_case, norm_case, centered_case])
def test_a_nan_stays_in_its_row(backend: Backend, dtype: torch.dtype, make: MakeCase) -> None:
    case = make(dtype)
    for each in case.inputs:
        each[8].view(-1)[7] = NAN
    out = case.run(backend).flatten(1)
    assert out.isnan().any(1).tolist() == [row == 8 for row in range(ROWS)]


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ((0, ROWS + 1, 0, 1.0), "outside the batch's rows"),
        ((-1, 2, 0, 1.0), "outside the batch's rows"),
        ((2, 1, 0, 1.0), "outside the batch's rows"),
        ((0, 1, SLOTS, 1.0), "adapter slot outside the table"),
        ((0, 1, -1, 1.0), "adapter slot outside the table"),
    ],
)
def test_segments_that_reach_outside_are_refused(
    compiled: Backend, make_case: MakeCase, group: Group, words: str
) -> None:
    case = make_case(torch.float32)
    out = case.out.clone()
    groups = segments_of([GROUPS[0], group])
    with pytest.raises(IndexError, match=words):
        case.apply(compiled, out, case.inputs, case.table, groups)
    assert same_bits(out, case.out)


def test_fields_that_reach_outside_are_refused(
    compiled: Backend, dtype: torch.dtype, make_case: MakeCase
) -> None:
    """Every size, number and offset of a cell in turn is made too large."""
    case = make_case(dtype)
    fields = (case.table.cells[PLACE] >= 0).nonzero().tolist()
    for slot, field in (each for each in fields if each[0] != EMPTY):
        for value in (case.table.numbers.numel() + 1, HUGE, 1 << 61):
            cells = case.table.cells.clone()
            cells[PLACE, slot, field] = value
            broken = replace(case.table, cells=cells)
            out = case.out.clone()
            with pytest.raises(IndexError, match=r"pool|names no"):
                case.apply(compiled, out, case.inputs, broken, segments_of(GROUPS))
            assert same_bits(out, case.out)


def test_a_pool_may_end_with_its_last_tensor_and_not_before(
    compiled: Backend, dtype: torch.dtype, make_case: MakeCase
) -> None:
    case = make_case(dtype)
    whole = case.run(compiled)
    gap = GAP * 4 // dtype.itemsize
    for cut in (0, 1, gap):
        short = replace(case.table, numbers=case.table.numbers[: len(case.table.numbers) - cut])
        assert same_bits(replace(case, table=short).run(compiled), whole)
    shorter = replace(case.table, numbers=case.table.numbers[: len(case.table.numbers) - gap - 2])
    with pytest.raises(IndexError, match="outside the pool"):
        replace(case, table=shorter).run(compiled)


@pytest.mark.parametrize("name", ["compiled", "reference"])
@pytest.mark.parametrize(
    ("make", "row", "token"),
    [
        (rows_case, 8, -1),
        (rows_case, 8, VOCAB),
        (rows_case, 8, HUGE),
        (embedding_case, 0, -1),
        (embedding_case, 8, -1),
        (embedding_case, 0, VOCAB),
        (embedding_case, 0, HUGE),
    ],
)
def test_tokens_outside_the_embedding_are_refused(
    request: pytest.FixtureRequest, name: str, make: MakeCase, row: int, token: int
) -> None:
    case = make(torch.float32)
    case.inputs[0][row] = token
    with pytest.raises(IndexError, match="token lies outside the embedding"):
        case.run(request.getfixturevalue(name))


def test_a_token_that_is_not_replaced_may_be_any(
    backend: Backend, reference: Backend, dtype: torch.dtype
) -> None:
    case = rows_case(dtype)
    case.inputs[0][40:43] = torch.tensor([-1, VOCAB, HUGE])
    for tested in (backend, reference):
        assert same_bits(case.run(tested)[40:43], case.out[40:43])


def test_float16(interpreted: Backend, reference: Backend, make_case: MakeCase) -> None:
    """On a GPU only: against the reference, which rounds as often, by some units of each other."""
    case = make_case(torch.float16)
    actual, expected = case.run(interpreted).float(), case.run(reference).float()
    torch.testing.assert_close(actual, expected, rtol=2.0**-10, atol=2.0**-8)


def test_wrong_tensors_are_refused_by_what_is_wrong(backend: Backend, make_case: MakeCase) -> None:
    case = make_case(torch.float32)
    first, *others = case.inputs
    numbers = replace(case.table, numbers=case.table.numbers.double())
    cells = replace(case.table, cells=case.table.cells.int())
    wide = torch.zeros(*case.out.shape[:-1], 2 * case.out.shape[-1])
    wrong = [
        (replace(case, out=case.out.bfloat16()), "bfloat16"),
        (replace(case, table=numbers), "float64"),
        (replace(case, table=cells), "cells must be"),
        (replace(case, inputs=(first[:-1], *others)), "differ in"),
        (replace(case, out=wide[..., ::2]), "strides|contiguous"),
    ]
    for each, words in wrong:
        with pytest.raises(ValueError, match=words):
            each.apply(backend, each.out, each.inputs, each.table, segments_of(GROUPS))
