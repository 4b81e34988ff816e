"""The device tier over poisoned memory: corrections through the reference ops, and the books."""

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deltamux.adapters.device.batch import make_batch
from deltamux.adapters.device.batch_layout import LatestLayout, RowRange, lay_out
from deltamux.adapters.device.extents import ExtentError
from deltamux.adapters.device.pool import AdapterPool
from deltamux.adapters.device.residency import Residency, ResidencyError
from deltamux.adapters.layout import BaseLayout, LinearSite, LinearTarget
from deltamux.adapters.primitives.linear import Affine, Dense, Sparse
from deltamux.adapters.primitives.lowered import LoweredAdapter, Part
from deltamux.adapters.scope import EveryPosition
from deltamux.kernels.backend import reference_backend
from deltamux.kernels.tables import SiteTargets

CPU = torch.device("cpu")
OPS = reference_backend().deltas


def site(*targets: LinearTarget) -> LinearSite:
    return LinearSite(targets)


LAYOUT = BaseLayout(
    model_type="toy",
    hidden_size=24,
    vocab_size=24,
    num_heads=1,
    num_kv_heads=1,
    head_dim=24,
    max_position=64,
    has_windows=False,
    tied_head=False,
    head_path="head",
    sites=(
        site(LinearTarget("a", 0, 24, 40, False), LinearTarget("b", 1, 24, 8, False)),
        site(LinearTarget("c", 2, 40, 24, False)),
        site(LinearTarget("head", 3, 24, 24, False)),
    ),
    norms=(),
    embeddings=(),
    layers=(),
)


def new_pool(num_slots=4, capacity_bytes=1 << 20, dtype=torch.float32) -> AdapterPool:
    memory = torch.empty(capacity_bytes, dtype=torch.uint8)
    pool = AdapterPool(LAYOUT, num_slots, memory, dtype)
    memory.view(dtype).fill_(float("nan"))
    return pool


def free_bytes(pool: AdapterPool) -> int:
    return pool.free_bytes


def one_part(*primitives) -> Part:
    return Part(EveryPosition(), primitives)


def toy(ranks: dict[str, int], biases: str = "", seed: int = 0, parts: int = 1) -> LoweredAdapter:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    def primitive(target):
        rank = ranks.get(target.path, 0)
        return Affine(
            target,
            noise(rank, target.in_features) if rank else None,
            noise(rank, target.out_features) if rank else None,
            noise(target.out_features) if target.path in biases else None,
        )

    adapted = [target for target in LAYOUT.iter_targets() if target.path in {*ranks, *biases}]
    return LoweredAdapter(
        f"{seed}",
        "lora",
        "peft",
        tuple(one_part(*(primitive(target) for target in adapted)) for _ in range(parts)),
    )


def drawn(seed: int, values: torch.Tensor) -> Sparse:
    """Values at places of "c" that are drawn from a seed."""
    target = LAYOUT.targets["c"]
    size = target.in_features * target.out_features
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    places = order[: len(values)].sort().values
    starts = torch.searchsorted(places, torch.arange(target.out_features + 1) * target.in_features)
    return Sparse(target, starts.int(), (places % target.in_features).int(), values)


def toy_drawn(places: int, seed: int, count: int = 50) -> LoweredAdapter:
    """Values of their own at places that others may have too, beside a low-rank part."""
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    primitives = (*toy({"a": 2}, seed=seed).primitives, drawn(places, values))
    return LoweredAdapter(f"{seed}", "fourierft", "peft", (one_part(*primitives),))


def delta(pool: AdapterPool, slots: list[int], path: str) -> torch.Tensor:
    """What the parts in the slots add to a row of ones on one module."""
    target = LAYOUT.targets[path]
    batch = make_batch(pool, OPS, [[RowRange(0, 1, slot, 1.0)] for slot in slots])
    if batch is None:
        return torch.zeros(target.out_features)
    targets = SiteTargets(target.index, (0,), (target.out_features,))
    x = torch.ones(1, target.in_features)
    return batch.linear(lambda x: torch.zeros(len(x), target.out_features), x, targets)[0]


def expected_delta(adapter: LoweredAdapter, path: str) -> torch.Tensor:
    total = torch.zeros(LAYOUT.targets[path].out_features)
    for primitive in adapter.primitives:
        if primitive.path == path and isinstance(primitive, Sparse):
            rows = torch.arange(len(total)).repeat_interleave(primitive.row_starts.diff())
            total = total.index_add(0, rows, primitive.values)
        elif primitive.path == path:
            if primitive.a is not None:
                total = total + primitive.a.sum(1) @ primitive.b
            if primitive.bias is not None:
                total = total + primitive.bias
    return total


def assert_serves(pool: AdapterPool, placement, adapter: LoweredAdapter) -> None:
    for path in LAYOUT.targets:
        actual, expected = delta(pool, placement.slots, path), expected_delta(adapter, path)
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-5)


def test_the_tables_are_the_same_objects_for_ever():
    pool = new_pool()
    table, pointer = pool.table(Affine), pool.table(Affine).numbers.data_ptr()
    pool.remove(pool.install(toy({"a": 3})))
    assert pool.table(Affine) is table
    assert pool.table(Affine).numbers.data_ptr() == pointer


def test_offsets_are_aligned_to_64_bytes():
    for dtype in (torch.float32, torch.bfloat16):
        pool = new_pool(dtype=dtype)
        for seed in range(3):
            placement = pool.install(toy({"a": 3, "b": 1, "c": 5}, "abc", seed))
            cells = pool.table(Affine).cells[:, placement.slots[0], 1:4]
            starts = cells[cells >= 0] * torch.float32.itemsize
            assert len(starts) == 9
            assert not (starts % 64).any()


def test_memory_is_rank_exact():
    for rank in (1, 4, 256):
        exact = toy({"a": rank}).num_elements * 4
        assert exact <= toy({"a": rank}).num_device_bytes < exact + 2 * 64


def test_a_slot_is_reused_without_traces_of_its_last_adapter():
    pool = new_pool(num_slots=1)
    first, second = toy({"a": 9, "b": 2}, "abc", 1), toy({"c": 2}, "b", 2)
    placement = pool.install(first)
    assert_serves(pool, placement, first)
    pool.remove(placement)
    again = pool.install(second)
    assert again.slots == placement.slots
    assert_serves(pool, again, second)


def test_no_room_changes_nothing():
    small, large = toy({"a": 2}, "a", 1), toy({"a": 40, "c": 40}, "", 2)
    pool = new_pool(num_slots=2, capacity_bytes=4096)
    slot, free = pool.install(small), free_bytes(pool)
    assert pool.install(large) is None
    assert free_bytes(pool) == free
    pool.check_integrity()
    assert_serves(pool, slot, small)


def test_slots_run_out_before_memory():
    pool = new_pool(num_slots=2)
    first, second, third = [pool.install(toy({"a": 1}, seed=i)) for i in range(3)]
    assert (first.slots, second.slots, third) == ((0,), (1,), None)


def test_a_pool_without_slots_or_memory():
    assert new_pool(num_slots=0).install(toy({"a": 1})) is None
    assert new_pool(capacity_bytes=0).install(toy({"a": 1})) is None


def test_removing_what_is_not_there():
    pool = new_pool()
    placement = pool.install(toy({"a": 1}))
    pool.remove(placement)
    with pytest.raises(ExtentError, match="not in the pool"):
        pool.remove(placement)


def test_every_part_has_a_slot_and_shared_tensors_lie_there_once():
    target = LAYOUT.targets["a"]
    shared = torch.randn(4, 24)
    first, second = (Affine(target, shared, torch.randn(4, 40)) for _ in range(2))
    adapter = LoweredAdapter("d", "vera", "peft", (one_part(first), one_part(second)))
    pool = new_pool()
    placement = pool.install(adapter)
    assert (len(placement.slots), len(pool._installed[placement].extents)) == (2, 3)
    assert adapter.num_device_bytes == 4 * (4 * 24 + 2 * 4 * 40)
    expected = expected_delta(adapter, "a")
    torch.testing.assert_close(delta(pool, placement.slots, "a"), expected)
    pool.check_integrity()


def places_of(pool: AdapterPool, placement) -> list[int]:
    """Where row starts and columns of a ``toy_drawn`` lie."""
    return pool.table(Sparse).cells[LAYOUT.targets["c"].index, placement.slots[0], 1:3].tolist()


def test_indices_that_adapters_have_alike_lie_there_once_while_one_has_them():
    first, second, other = toy_drawn(7, seed=1), toy_drawn(7, seed=2), toy_drawn(8, seed=3)
    pool = new_pool()
    one, two, three = (pool.install(adapter) for adapter in (first, second, other))
    assert places_of(pool, one) == places_of(pool, two)
    assert set(places_of(pool, one)).isdisjoint(places_of(pool, three))
    used = pool._extents.used
    for placement, adapter, freed in ((one, first, False), (two, second, True)):
        assert_serves(pool, placement, adapter)
        pool.remove(placement)
        pool.check_integrity()
        apart = sum(tensor.nbytes for tensor in adapter.tensors if tensor.dtype != torch.int32)
        assert (used - pool._extents.used >= adapter.num_device_bytes) == freed
        assert used - pool._extents.used >= apart
        used = pool._extents.used
    assert_serves(pool, three, other)
    again = pool.install(second)
    assert_serves(pool, again, second)


def test_an_adapter_counts_with_indices_that_others_have_too():
    pool = new_pool(capacity_bytes=1 << 14)
    free = free_bytes(pool)
    adapters = [toy_drawn(7, seed) for seed in range(3)]
    placements = [pool.install(adapter) for adapter in adapters]
    for adapter in adapters:
        free -= adapter.num_device_bytes
    assert free_bytes(pool) == free
    with pytest.raises(ExtentError, match="do not fit"):
        pool.resize(pool._extents.used)
    for placement, adapter in zip(placements, adapters, strict=True):
        pool.remove(placement)
        free += adapter.num_device_bytes
        assert free_bytes(pool) == free


def test_indices_of_several_adapters_move_for_all_of_them():
    adapters = [toy_drawn(7, seed) for seed in range(3)]
    gap = toy({"a": 9, "c": 9})
    pool = new_pool()
    hole = pool.install(gap)
    placements = [pool.install(adapter) for adapter in adapters]
    pool.remove(hole)
    before = places_of(pool, placements[0])
    pool.resize(sum(adapter.num_device_bytes for adapter in adapters))
    assert places_of(pool, placements[0]) != before
    pool.check_integrity()
    late = toy_drawn(7, seed=9)
    pool.remove(placements.pop(0))
    placements.append(pool.install(late))
    assert len({tuple(places_of(pool, placement)) for placement in placements}) == 1
    for placement, adapter in zip(placements, [*adapters[1:], late], strict=True):
        assert_serves(pool, placement, adapter)
    pool.check_integrity()


def test_long_indices_are_those_of_one_adapter():
    long = torch.zeros(1 << 15, dtype=torch.int32)
    primitive = Sparse(LAYOUT.targets["c"], torch.zeros(25, dtype=torch.int32), long, long.float())
    digests = LoweredAdapter("d", "x", "y", (one_part(primitive),)).index_digests
    assert [digest is None for digest in digests] == [False, True, True]


def test_indices_lie_beside_numbers_of_another_width():
    rows, columns, values = [7, 7, 39], [3, 20, 0], [2.0, 4.0, 8.0]
    sparse = Sparse(
        LAYOUT.targets["a"],
        torch.tensor([sum(row < o for row in rows) for o in range(41)], dtype=torch.int32),
        torch.tensor(columns, dtype=torch.int32),
        torch.tensor(values, dtype=torch.bfloat16),
    )
    expected = torch.zeros(40)
    expected[7], expected[39] = 6, 8
    pool = new_pool(dtype=torch.bfloat16)
    pool.install(toy({}))
    placement = pool.install(LoweredAdapter("d", "shira", "peft", (one_part(sparse),)))
    torch.testing.assert_close(delta(pool, placement.slots, "a"), expected)
    pool.check_integrity()


def test_only_what_changes_the_head_is_looked_at_behind_the_layers():
    pool = new_pool()
    layers, head = pool.install(toy({"a": 2})), pool.install(toy({"a": 2, "head": 1}))
    assert not pool.changes_head(*layers.slots)
    assert pool.changes_head(*head.slots)
    pool.remove(head)
    assert not pool.changes_head(*pool.install(toy({"a": 2})).slots)


def test_a_batch_has_only_what_its_adapters_have():
    pool = new_pool()
    affine = pool.install(toy({"a": 2}))
    weight = torch.randn(24, 40)
    dense = pool.install(
        LoweredAdapter("d", "x", "y", (one_part(Dense(LAYOUT.targets["c"], weight)),))
    )
    empty = pool.install(LoweredAdapter("e", "x", "y", (one_part(),)))
    batches = {
        placement: make_batch(pool, OPS, [[RowRange(0, 3, placement.slots[0], 1.0)]])
        for placement in (affine, dense, empty)
    }
    assert batches[empty] is None
    assert [len(batches[one]._linear) for one in (affine, dense)] == [1, 1]
    assert batches[affine]._linear[0].rows == (True, False, False, False)
    assert batches[dense]._linear[0].rows == (False, False, True, False)
    assert make_batch(pool, OPS, [[], []]) is None


def test_a_layout_is_kept_while_rows_and_adapters_stay():
    pool = new_pool()
    layouts = LatestLayout(pool)
    placement = pool.install(toy({"a": 3}))
    (slot,) = placement.slots

    def rows(end=2):
        return [[RowRange(0, end, slot, 1.0)]]

    first = layouts.of(rows(), 4)
    assert list(first) == [Affine]
    assert layouts.of(rows(), 4) is first
    for passes, bucket in ((rows(3), 4), (rows(3), None), ([[]], None)):
        assert_same_layout(layouts.of(passes, bucket), lay_out(pool, passes, bucket))
    pool.remove(placement)
    assert pool.install(
        LoweredAdapter("d", "x", "y", (one_part(Dense(LAYOUT.targets["c"], torch.ones(24, 40))),))
    ).slots == (slot,)
    assert list(layouts.of(rows(), 4)) == [Dense]


def assert_same_layout(found, expected):
    assert found.keys() == expected.keys()
    for kind, part in found.items():
        assert part.rows == expected[kind].rows
        for one, other in zip(part.passes, expected[kind].passes, strict=True):
            assert (one.max_rows, one.max_inner) == (other.max_rows, other.max_inner)
            np.testing.assert_array_equal(one.columns, other.columns)
            np.testing.assert_array_equal(one.rows, other.rows)


@pytest.mark.parametrize("overlapping", [False, True])
def test_passes_add_up_with_their_weights(overlapping):
    pool = new_pool()
    adapters = [toy({"a": 3}, "a", seed) for seed in range(2)]
    [one], [two] = (pool.install(adapter).slots for adapter in adapters)
    ranges = [RowRange(0, 4, one, 0.5), RowRange(2 if overlapping else 4, 6, two, -2.0)]
    batch = make_batch(pool, OPS, [[each] for each in ranges] if overlapping else [ranges])
    target = LAYOUT.targets["a"]
    y = batch.linear(
        lambda x: torch.zeros(len(x), 40),
        torch.ones(7, 24),
        SiteTargets(target.index, (0,), (40,)),
    )
    expected = torch.zeros(7, 40)
    for each, adapter in zip(ranges, adapters, strict=True):
        expected[each.start : each.end] += each.weight * expected_delta(adapter, "a")
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-5)


def test_free_bytes_return():
    pool = new_pool(capacity_bytes=10_000)
    free = free_bytes(pool)
    adapters = [toy({"a": 3 + i}, "b", i) for i in range(3)]
    slots = [pool.install(adapter) for adapter in adapters]
    assert free_bytes(pool) == free - sum(adapter.num_device_bytes for adapter in adapters)
    for slot in slots:
        pool.remove(slot)
    assert free_bytes(pool) == free


def test_holes_are_never_lost():
    """Every second adapter goes, and one as large as all of them comes."""
    small, large = [toy({"a": 4}, seed=seed) for seed in range(8)], toy({"a": 16}, seed=9)
    pool = new_pool(num_slots=9, capacity_bytes=8 * small[0].num_device_bytes)
    placements = [pool.install(adapter) for adapter in small]
    assert pool.install(large) is None
    for placement in placements[::2]:
        pool.remove(placement)
    assert pool.free_bytes == large.num_device_bytes
    assert_serves(pool, pool.install(large), large)
    pool.check_integrity()
    for adapter, placement in zip(small[1::2], placements[1::2], strict=True):
        assert_serves(pool, placement, adapter)


def test_the_rest_of_the_memory_is_somebody_elses():
    adapters = [toy({"a": 4, "b": 3}, "c", seed=seed) for seed in range(6)]
    size = adapters[0].num_device_bytes
    pool = new_pool(num_slots=6, capacity_bytes=8 * size)
    pool.resize(6 * size)
    placements = [pool.install(adapter) for adapter in adapters]
    for number in (1, 4, 2):
        pool.remove(placements[number])
    pool.resize(3 * size)
    pool._memory[: 5 * size] = 255
    pool.check_integrity()
    for number in (0, 3, 5):
        assert_serves(pool, placements[number], adapters[number])
    with pytest.raises(ExtentError, match="do not fit"):
        pool.resize(2 * size)
    assert pool.install(adapters[1]) is None


def test_sizes_are_added_up_once():
    adapter = toy({"a": 3, "b": 1}, "c")
    assert adapter.num_elements == 3 * 64 + 32 + 24
    assert adapter.num_bytes == 4 * adapter.num_elements
    assert adapter.num_device_bytes == sum(-(-t.nbytes // 64) * 64 for t in adapter.tensors)
    assert adapter.tensors is adapter.tensors


class Traffic(RuleBasedStateMachine):
    """Sequences come and go over more adapters than fit; a plain model says what must hold."""

    ADAPTERS = 8

    def __init__(self) -> None:
        super().__init__()
        self.adapters = [
            toy({"a": 1 + 5 * (i % 3), "c": i}, "abc"[: i % 4], seed=i, parts=1 + (i == 3))
            for i in range(1, self.ADAPTERS - 1)
        ] + [toy_drawn(7, seed=i) for i in range(2)]
        self.pool = new_pool(num_slots=4, capacity_bytes=8000)
        self.capacity = free_bytes(self.pool)
        self.residency = Residency(self.pool, self.adapters.__getitem__)
        self.holders = [0] * self.ADAPTERS
        self.idle: list[int] = []

    @rule(adapter=st.integers(0, ADAPTERS - 1))
    def acquire(self, adapter):
        before = self.residency.resident()
        slots = {other: self.residency.place(other) for other in before}
        if not self.residency.acquire(adapter):
            size = self.adapters[adapter]
            held = [self.adapters[a] for a, count in enumerate(self.holders) if count]
            room = self.capacity - sum(each.num_device_bytes for each in held)
            slots_left = 4 - sum(len(each.parts) for each in held)
            assert size.num_device_bytes > room or len(size.parts) > slots_left
            assert adapter not in before
            assert self.residency.resident() == before
            assert {other: self.residency.place(other) for other in before} == slots
            return
        self.holders[adapter] += 1
        gone = set(before) - set(self.residency.resident())
        left = [other for other in self.idle if other != adapter]
        assert gone == set(left[: len(gone)]), "not the least recently used ones"
        self.idle = left[len(gone) :]

    @precondition(lambda self: any(self.holders))
    @rule(data=st.data())
    def release(self, data):
        held = [adapter for adapter, count in enumerate(self.holders) if count]
        adapter = data.draw(st.sampled_from(held))
        self.residency.release(adapter)
        self.holders[adapter] -= 1
        if not self.holders[adapter]:
            self.idle.append(adapter)

    @rule(adapter=st.integers(0, ADAPTERS - 1))
    def unload(self, adapter):
        if self.holders[adapter]:
            with pytest.raises(ResidencyError, match=f"adapter {adapter} cannot go"):
                self.residency.drop(adapter)
        else:
            self.residency.drop(adapter)
            self.idle = [other for other in self.idle if other != adapter]

    @rule(adapter=st.integers(0, ADAPTERS - 1))
    def release_too_often(self, adapter):
        if not self.holders[adapter]:
            with pytest.raises(ResidencyError):
                self.residency.release(adapter)

    @rule(adapter=st.integers(0, ADAPTERS - 1))
    def serve(self, adapter):
        if adapter in self.residency.resident():
            assert_serves(self.pool, self.residency.place(adapter), self.adapters[adapter])
        else:
            with pytest.raises(ResidencyError):
                self.residency.place(adapter)

    @invariant()
    def books_balance(self):
        self.residency.check_integrity()
        resident = self.residency.resident()
        held = {adapter for adapter, count in enumerate(self.holders) if count}
        assert set(resident) == held | set(self.idle)
        slots = [slot for adapter in resident for slot in self.residency.place(adapter).slots]
        assert len(set(slots)) == len(slots)
        used = sum(self.adapters[adapter].num_device_bytes for adapter in resident)
        assert free_bytes(self.pool) + used == self.capacity

    def teardown(self):
        for adapter, count in enumerate(self.holders):
            for _ in range(count):
                self.residency.release(adapter)
        for adapter in self.residency.resident():
            assert_serves(self.pool, self.residency.place(adapter), self.adapters[adapter])
            self.residency.drop(adapter)
        self.residency.check_integrity()
        assert free_bytes(self.pool) == self.capacity


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


def test_what_is_held_never_keeps_idle_room_from_others():
    """Idle adapters of enough bytes are enough, wherever what is held lies."""
    adapters = [toy({"a": 30}, seed=0), *(toy({"a": 10}, seed=seed) for seed in range(1, 5))]
    pool = new_pool(capacity_bytes=4 * adapters[1].num_device_bytes)
    residency = Residency(pool, adapters.__getitem__)
    for adapter in (1, 2, 3, 4):
        assert residency.acquire(adapter)
    for adapter in (1, 4):
        residency.release(adapter)
    assert not residency.acquire(0)
    assert residency.resident() == [1, 2, 3, 4]
    residency.release(3)
    assert residency.acquire(0)
    assert residency.resident() == [2, 0]
    for adapter in (2, 0):
        assert_serves(pool, residency.place(adapter), adapters[adapter])


def test_a_held_adapter_costs_no_second_copy():
    loads = []
    adapters = [toy({"a": 4})]
    residency = Residency(new_pool(), lambda i: loads.append(i) or adapters[i])
    assert all(residency.acquire(0) for _ in range(3))
    assert loads == [0]
