"""The device tier over poisoned memory: deltas through the kernels' reference, and the books."""

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deltamux.adapters.batch import group_rows
from deltamux.adapters.extents import ExtentError, Extents
from deltamux.adapters.layout import BaseLayout, LinearSite, LinearTarget
from deltamux.adapters.lower import lower
from deltamux.adapters.pool import AdapterPool
from deltamux.adapters.primitives import LoweredAdapter, LowRank, OutputBias
from deltamux.adapters.residency import Residency, ResidencyError
from deltamux.kernels.low_rank.op import Segments, SiteTargets
from deltamux.kernels.low_rank.reference import add_low_rank

from .peft_oracle import ROOM, peft_deltas, reload

CPU = torch.device("cpu")


def new_pool(layout, num_slots=4, capacity_bytes=1 << 20, dtype=torch.float32) -> AdapterPool:
    pool = AdapterPool(layout, num_slots, capacity_bytes, dtype, CPU)
    pool.table.pool.fill_(float("nan"))
    return pool


def free_bytes(pool: AdapterPool) -> int:
    return pool._extents.free * pool.table.pool.itemsize


def segments_of(slots: list[int | None]) -> Segments:
    groups = group_rows(slots)
    parts = np.array(groups, dtype=np.int32).reshape(-1, 3).T.copy()
    return Segments(*(torch.from_numpy(part) for part in parts))


def batch_deltas(pool, layout, slots, inputs) -> dict[str, torch.Tensor]:
    """Module path -> what add_low_rank adds, site by site, to a batch of one row per slot."""
    deltas = {}
    for site in layout.sites:
        x = inputs(site.targets[0].path, site.in_features)
        y = torch.zeros(len(slots), site.out_features)
        sizes = tuple(target.out_features for target in site.targets)
        targets = SiteTargets(site.targets[0].index, site.out_starts, sizes)
        add_low_rank(y, x, pool.table, targets, segments_of(slots))
        for target, part in zip(site.targets, y.split(sizes, dim=1), strict=True):
            deltas[target.path] = part
    return deltas


MIXED = {
    "llama": [
        {"r": 1, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"]},
        {"r": 16, "use_rslora": True, "target_modules": "all-linear"},
        {"r": 256, "target_modules": ["k_proj", "lm_head"], "layers_to_transform": None},
        {"r": 5, "lora_bias": True, "target_modules": ["v_proj", "up_proj"]},
    ],
    "qwen2": [
        {"r": 2, "lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
        {"r": 7, "target_modules": ["k_proj"], "layers_to_transform": [1]},
    ],
    "gpt2": [
        {"r": 4, "target_modules": ["c_attn", "c_proj"]},
        {"r": 3, "lora_bias": True, "target_modules": ["c_fc"]},
        {"r": 9, "alpha_pattern": {"c_attn": 40}, "target_modules": ["c_attn"]},
    ],
}


@pytest.mark.parametrize("family", MIXED)
def test_a_mixed_batch_equals_peft_row_by_row(family, save_lora, bases, layouts):
    layout, configs = layouts[family], MIXED[family]
    folders = [save_lora(family, name=str(i), seed=i, **c) for i, c in enumerate(configs)]
    pool = new_pool(layout)
    slots = [pool.install(lower(folder, layout, torch.float32, ROOM)) for folder in folders]
    assert None not in slots
    rows = [None, *sorted([*slots, *slots, slots[-1]]), None, None]

    def inputs(path, width):  # q, k, v read one x, as do gate and up
        generator = torch.Generator().manual_seed(sum(path.rpartition(".")[0].encode()))
        return torch.randn(len(rows), width, generator=generator)

    actual = batch_deltas(pool, layout, rows, inputs)
    for folder, slot in zip(folders, slots, strict=True):
        expected = peft_deltas(reload(bases[family], folder), inputs)
        mine = [row for row, other in enumerate(rows) if other == slot]
        for path, delta in actual.items():
            wanted = expected.get(path, torch.zeros_like(delta))
            torch.testing.assert_close(delta[mine], wanted[mine], atol=1e-5, rtol=1e-5)
    base_rows = [row for row, other in enumerate(rows) if other is None]
    for delta in actual.values():
        assert not delta[base_rows].any()


SITE = LinearSite((LinearTarget("a", 0, 24, 40), LinearTarget("b", 1, 24, 8)))
LAYOUT = BaseLayout("toy", 1, 24, 97, (SITE, LinearSite((LinearTarget("c", 2, 40, 24),))))


def toy(ranks: dict[str, int], biases: str = "", seed: int = 0) -> LoweredAdapter:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    primitives = []
    for path, target in LAYOUT.targets.items():
        if rank := ranks.get(path, 0):
            a, b = noise(rank, target.in_features), noise(rank, target.out_features)
            primitives.append(LowRank(target, a, b))
        if path in biases:
            primitives.append(OutputBias(target, noise(target.out_features)))
    return LoweredAdapter(f"{seed}", "lora", "peft", max(ranks.values(), default=0), (*primitives,))


def delta_of(pool: AdapterPool, slot: int, path: str) -> torch.Tensor:
    return batch_deltas(pool, LAYOUT, [slot], lambda _, width: torch.ones(1, width))[path][0]


def expected_delta(adapter: LoweredAdapter, path: str) -> torch.Tensor:
    target = LAYOUT.targets[path]
    delta = torch.zeros(target.out_features)
    for primitive in adapter.primitives:
        if primitive.target is target:
            if isinstance(primitive, LowRank):
                delta = delta + primitive.a.sum(1) @ primitive.b
            else:
                delta = delta + primitive.bias
    return delta


def assert_serves(pool: AdapterPool, slot: int, adapter: LoweredAdapter) -> None:
    for path in LAYOUT.targets:
        actual, expected = delta_of(pool, slot, path), expected_delta(adapter, path)
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-5)


def test_the_table_is_the_same_object_for_ever():
    pool = new_pool(LAYOUT)
    table, pointer = pool.table, pool.table.pool.data_ptr()
    slot = pool.install(toy({"a": 3}))
    pool.remove(slot)
    assert pool.table is table
    assert pool.table.pool.data_ptr() == pointer


def test_offsets_are_aligned_to_64_bytes():
    for dtype in (torch.float32, torch.bfloat16):
        pool = new_pool(LAYOUT, dtype=dtype)
        for seed in range(3):
            slot = pool.install(toy({"a": 3, "b": 1, "c": 5}, "abc", seed))
            for offsets in (pool.table.a_offset, pool.table.b_offset, pool.table.bias_offset):
                assert not (offsets[:, slot] * dtype.itemsize % 64).any()


def test_memory_is_rank_exact():
    for rank in (1, 4, 256):
        exact = toy({"a": rank}).num_elements * 4
        assert exact <= toy({"a": rank}).num_device_bytes < exact + 2 * 64


def test_a_slot_is_reused_without_traces_of_its_last_adapter():
    pool = new_pool(LAYOUT, num_slots=1)
    first, second = toy({"a": 9, "b": 2}, "abc", 1), toy({"c": 2}, "b", 2)
    slot = pool.install(first)
    assert_serves(pool, slot, first)
    pool.remove(slot)
    assert pool.install(second) == slot
    assert_serves(pool, slot, second)


def test_no_room_changes_nothing():
    small, large = toy({"a": 2}, "a", 1), toy({"a": 40, "c": 40}, "", 2)
    pool = new_pool(LAYOUT, num_slots=2, capacity_bytes=4096)
    assert not pool.fits_at_all(large)
    slot, free = pool.install(small), free_bytes(pool)
    assert pool.install(large) is None
    assert pool.evictions_for(large, [slot]) is None
    assert free_bytes(pool) == free
    pool.check_integrity()
    assert_serves(pool, slot, small)


def test_slots_run_out_before_memory():
    pool = new_pool(LAYOUT, num_slots=2)
    slots = [pool.install(toy({"a": 1}, seed=i)) for i in range(3)]
    assert slots == [0, 1, None]
    assert pool.evictions_for(toy({"a": 1}), [1, 0]) == 1
    assert pool.evictions_for(toy({"a": 1}), []) is None


def test_a_pool_without_slots_or_memory():
    assert new_pool(LAYOUT, num_slots=0).install(toy({"a": 1})) is None
    assert new_pool(LAYOUT, capacity_bytes=0).install(toy({"a": 1})) is None


def test_removing_an_empty_slot():
    with pytest.raises(ExtentError, match="slot 1 is empty"):
        new_pool(LAYOUT).remove(1)


def test_free_bytes_return():
    pool = new_pool(LAYOUT, capacity_bytes=10_000)
    free = free_bytes(pool)
    adapters = [toy({"a": 3 + i}, "b", i) for i in range(3)]
    slots = [pool.install(adapter) for adapter in adapters]
    assert free_bytes(pool) == free - sum(adapter.num_device_bytes for adapter in adapters)
    for slot in slots:
        pool.remove(slot)
    assert free_bytes(pool) == free


def test_what_cannot_fit_is_told_by_sizes_alone(monkeypatch):
    """Hundreds of adapters may wait for a full pool, and each asks again and again."""
    pool = new_pool(LAYOUT, num_slots=2, capacity_bytes=toy({"a": 9}).num_device_bytes)
    slot = pool.install(toy({"a": 9}))
    monkeypatch.setattr(Extents, "copy", None)
    assert pool.evictions_for(toy({"a": 1}), []) is None
    assert pool.evictions_for(toy({"a": 10}), [slot]) is None
    monkeypatch.undo()
    assert pool.evictions_for(toy({"a": 9}), [slot]) == 1


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
            toy({"a": 1 + 5 * (i % 3), "c": i}, "abc"[: i % 4], seed=i)
            for i in range(1, self.ADAPTERS + 1)
        ]
        self.pool = new_pool(LAYOUT, num_slots=4, capacity_bytes=8000)
        self.capacity = free_bytes(self.pool)
        self.residency = Residency(self.pool, self.adapters.__getitem__)
        self.holders = [0] * self.ADAPTERS
        self.idle: list[int] = []

    @rule(adapter=st.integers(0, ADAPTERS - 1))
    def acquire(self, adapter):
        before = self.residency.resident()
        slots = {other: self.residency.slot(other) for other in before}
        if not self.residency.acquire(adapter):
            assert any(self.holders), "everything could have made way"
            assert adapter not in before
            assert self.residency.resident() == before
            assert {other: self.residency.slot(other) for other in before} == slots
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
            assert_serves(self.pool, self.residency.slot(adapter), self.adapters[adapter])
        else:
            with pytest.raises(ResidencyError):
                self.residency.slot(adapter)

    @invariant()
    def books_balance(self):
        self.residency.check_integrity()
        resident = self.residency.resident()
        held = {adapter for adapter, count in enumerate(self.holders) if count}
        assert set(resident) == held | set(self.idle)
        assert len({self.residency.slot(adapter) for adapter in resident}) == len(resident)
        used = sum(self.adapters[adapter].num_device_bytes for adapter in resident)
        assert free_bytes(self.pool) + used == self.capacity

    def teardown(self):
        for adapter, count in enumerate(self.holders):
            for _ in range(count):
                self.residency.release(adapter)
        for adapter in self.residency.resident():
            assert_serves(self.pool, self.residency.slot(adapter), self.adapters[adapter])
            self.residency.drop(adapter)
        self.residency.check_integrity()
        assert free_bytes(self.pool) == self.capacity


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


def test_an_adapter_that_nothing_holds_can_always_make_way():
    """Whatever fits at all gets in once every other adapter is idle."""
    adapters = [toy({"a": 30}, seed=0), toy({"a": 14}, seed=1), toy({"a": 14}, seed=2)]
    pool = new_pool(LAYOUT, capacity_bytes=adapters[0].num_device_bytes)
    residency = Residency(pool, adapters.__getitem__)
    for adapter in (1, 2):
        assert residency.acquire(adapter)
    assert not residency.acquire(0)
    residency.release(1)
    assert not residency.acquire(0)
    assert residency.resident() == [1, 2]
    residency.release(2)
    assert residency.acquire(0)
    assert residency.resident() == [0]


def test_a_held_adapter_costs_no_second_copy():
    loads = []
    adapters = [toy({"a": 4})]
    residency = Residency(new_pool(LAYOUT), lambda i: loads.append(i) or adapters[i])
    assert all(residency.acquire(0) for _ in range(3))
    assert loads == [0]
