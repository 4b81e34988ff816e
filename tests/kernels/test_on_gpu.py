"""How operands come to a GPU and back, with the CPU in its place: then nothing may differ."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from deltamux.kernels.backend import Backend
from deltamux.kernels.tables import PrimitiveTable, Segments, SiteTargets

from .compare import same_bits
from .on_gpu import all_moved, moved
from .paged_steps import check, make_step
from .pools import FIRST, Pool, segments_of, strided_rows
from .row_cases import EVERY, GROUPS, MakeCase, bottleneck_case

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def there(reference: Backend) -> Backend:
    """The reference, on copies of its operands."""
    return all_moved(reference, CPU)


@pytest.mark.parametrize("make", EVERY, ids=lambda make: make.__name__)
def test_what_changes_in_place_comes_back(
    there: Backend, reference: Backend, dtype: torch.dtype, make: MakeCase
) -> None:
    case = make(dtype)
    assert same_bits(case.run(there), case.run(reference))
    assert not same_bits(case.run(there), case.out)


def test_the_tensor_that_is_read_may_be_the_one_that_changes(
    there: Backend, reference: Backend
) -> None:
    outs = []
    for backend in (there, reference):
        case = bottleneck_case(torch.bfloat16)
        out = case.inputs[0]
        case.apply(backend, out, case.inputs, case.table, segments_of(GROUPS))
        outs.append(out)
    assert same_bits(*outs)


def test_views_change_in_their_buffers_and_nothing_beside_them(
    there: Backend, dtype: torch.dtype
) -> None:
    """Query and key are strided views of one buffer, which holds NaN beside them."""
    wide = torch.full((5, 9, 8), float("nan"), dtype=dtype)
    query, key = wide[:, 1:4], wide[:, 5:7]
    query.fill_(1.0)
    key.fill_(2.0)
    angle = torch.full((5, 4), torch.pi / 2)
    there.rotary(query, key, angle.cos(), angle.sin())
    turned = torch.tensor([-1.0] * 4 + [1.0] * 4)
    torch.testing.assert_close(query.float(), turned.expand(5, 3, 8))
    torch.testing.assert_close(key.float(), 2 * turned.expand(5, 2, 8))
    assert wide[:, [0, 4, 7, 8]].isnan().all()


def test_results_and_caches_come_back(there: Backend, dtype: torch.dtype) -> None:
    step = make_step(dtype, [(1, 17), (5, 20)])
    check(there, step)
    before = step.key_cache.clone()
    there.write_kv(
        step.query[:, :3], step.query[:, 3:6], step.key_cache, step.value_cache,
        step.batch.slot_mapping,
    )  # fmt: skip
    assert not same_bits(step.key_cache, before)


def test_a_prepared_product_keeps_its_weight(there: Backend, reference: Backend) -> None:
    weight, x = torch.randn(3, 5), torch.randn(2, 5)
    expected = reference.prepare_linear(weight, None)(x)
    product = there.prepare_linear(weight, None)
    weight.zero_()
    torch.testing.assert_close(product(x), expected)


@dataclass
class Seen:
    """What an operation was given."""

    given: Sequence[Tensor] = ()

    def correct(
        self, y: Tensor, x: Tensor, table: PrimitiveTable, _: SiteTargets, segments: Segments
    ) -> None:
        self.given = (y, x, table.cells, table.numbers, table.indices, segments.start)
        y.add_(1)
        table.numbers[0] = 7.0


def test_the_device_has_strides_offsets_and_shared_memory_of_its_own() -> None:
    pool, seen = Pool(torch.float32), Seen()
    pool.put(torch.ones(4))
    table, rng = pool.table(1, 1, {(0, 0): (0,)}), torch.Generator().manual_seed(0)
    x, y = strided_rows(3, 5, torch.float32, rng), strided_rows(3, 5, torch.float32, rng)
    before, segments = y.clone(), segments_of([(0, 3, 0, 1.0)])
    moved(seen.correct, CPU)(y, x, table, SiteTargets(FIRST, (0,), (5,)), segments)
    given = (y, x, table.cells, table.numbers, table.indices, segments.start)
    for here, on_device in zip(given, seen.given, strict=True):
        assert (here.stride(), here.storage_offset(), here.dtype) == (
            on_device.stride(),
            on_device.storage_offset(),
            on_device.dtype,
        )
        assert here.untyped_storage().data_ptr() != on_device.untyped_storage().data_ptr()
    numbers, indices = seen.given[3], seen.given[4]
    assert numbers.untyped_storage().data_ptr() == indices.untyped_storage().data_ptr()
    torch.testing.assert_close(y, before + 1)
    assert table.numbers[0] == 7.0, "a write that should not be is seen as well"


def test_errors_are_the_operations_own(there: Backend) -> None:
    case = bottleneck_case(torch.float32)
    with pytest.raises(IndexError, match="reaches outside"):
        case.apply(
            there,
            case.out,
            case.inputs,
            PrimitiveTable(case.table.cells, case.table.numbers[:9], case.table.indices),
            segments_of(GROUPS),
        )


def test_every_tensor_of_a_pool_begins_at_64_bytes_behind_poison(dtype: torch.dtype) -> None:
    pool = Pool(dtype)
    starts = [pool.put(torch.ones(size, dtype=dtype)) for size in (1, 16, 17, 3, 64, 32)]
    numbers = pool.table(1, 1, {}).numbers
    assert numbers.data_ptr() % 64 == 0
    assert all(start * dtype.itemsize % 64 == 0 for start in starts)
    assert all(numbers[start - 5 : start].isnan().all() for start in starts)
    assert numbers[-5:].isnan().all()
