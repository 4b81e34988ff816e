"""Recorded steps: what they compute again, on what lies in the places of their inputs by then."""

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from deltamux.kernels.backend import Backend
from deltamux.kernels.cpu.program import Arena, NotRecordable, Padded, Programs

from .compare import same_bits


@pytest.fixture
def programs(compiled: Backend) -> Programs:
    assert compiled.programs is not None
    return Programs(compiled.programs.library)


@pytest.fixture
def step(compiled: Backend, dtype: torch.dtype) -> tuple[Callable[[], Tensor], Tensor]:
    """A few layers of the base's operations with torch's between them, and their input."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    hidden, inner = 48, 40
    up = [compiled.prepare_linear(drawn(2 * inner, hidden), drawn(2 * inner)) for _ in range(4)]
    down = [compiled.prepare_linear(drawn(hidden, inner), None) for _ in range(4)]
    x, norm = drawn(5, hidden), drawn(hidden)

    def compute() -> Tensor:
        residual = x.clone()
        y = torch.zeros_like(residual)
        for first, second in zip(up, down, strict=True):
            normed = compiled.add_rms_norm(y, residual, norm, 1e-5)
            y = second(compiled.silu_mul(first(normed)))
            y[1:3] *= 2
            y = torch.cat([y[:2], y[2:]])
        return (residual + y).float()

    return compute, x


def test_a_recorded_step_computes_what_the_step_does(
    step: tuple[Callable[[], Tensor], Tensor], programs: Programs
) -> None:
    compute, x = step
    first = compute()
    replay = programs.capture(compute)
    assert same_bits(replay(), first)
    for scale in (0.5, -3.0):
        x *= scale
        expected = compute()
        assert same_bits(replay(), expected)
        assert not torch.equal(expected, first)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 7], indirect=True)
def test_threads_that_come_late_or_not_at_all_change_nothing(
    compiled: Backend, programs: Programs, threads: int, dtype: torch.dtype
) -> None:
    """More threads than cores, beside busy ones: the system keeps some of a team from running."""
    generator = torch.Generator().manual_seed(0)
    rows, hidden, inner = 37, 160, 480

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    up = compiled.prepare_linear(drawn(2 * inner, hidden), None)
    down = compiled.prepare_linear(drawn(hidden, inner), None)
    x = drawn(rows, hidden)
    norm = torch.ones(hidden, dtype=dtype)

    def compute() -> Tensor:
        residual = x + 0
        y = x
        for _ in range(12):
            normed = compiled.add_rms_norm(y, residual, norm, 1e-5)
            y = down(compiled.silu_mul(up(normed)))
        return y

    torch.set_num_threads(1)
    alone = compute()
    torch.set_num_threads(threads)
    replay = programs.capture(compute)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        for _ in range(20):
            assert same_bits(replay(), alone)
    finally:
        for each in busy:
            each.kill()
            each.wait()


@pytest.mark.parametrize("inference", [False, True])
def test_conversions_and_shapes_are_recorded_where_they_copy(
    programs: Programs, inference: bool
) -> None:
    x = torch.arange(6, dtype=torch.bfloat16).view(2, 3)

    def compute() -> Tensor:
        y = x.view(3, 2).bfloat16().contiguous().t().reshape(6)
        return y.float().view(2, 3).float()

    with torch.inference_mode(inference):
        replay = programs.capture(compute)
        x += 1
        assert torch.equal(replay(), compute())


def test_room_for_a_result_is_not_made_again(programs: Programs) -> None:
    x = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    program = programs.record(lambda: torch.empty_like(x, dtype=torch.float32).copy_(x))
    (copy,) = program.parts
    assert copy.function is torch.ops.aten.copy_.default
    x += 1
    assert torch.equal(program.replay(), x.float())


def test_recorded_steps_share_their_memory_and_not_their_results(
    step: tuple[Callable[[], Tensor], Tensor], programs: Programs
) -> None:
    compute, x = step
    replays = [programs.capture(compute), programs.capture(lambda: compute()[:3] * 2)]
    for change in (1.0, 2.0):
        x += change
        expected = compute()
        for replay, wanted in zip(replays, (expected, expected[:3] * 2), strict=True):
            assert same_bits(replay(), wanted)


@pytest.fixture
def padded_step(compiled: Backend, dtype: torch.dtype) -> tuple[Callable[[], Tensor], Tensor]:
    """Kernels and torch's operations over 8 rows, and their input."""
    x, norm = torch.randn(8, 48).to(dtype), torch.randn(48).to(dtype)

    def compute() -> Tensor:
        residual = x.clone()
        y = compiled.add_rms_norm(residual, residual, norm, 1e-5)
        return compiled.silu_mul(y * 2)

    return compute, x


def test_a_padded_step_is_made_again_for_any_number_of_rows(
    padded_step: tuple[Callable[[], Tensor], Tensor], programs: Programs
) -> None:
    compute, x = padded_step
    expected = compute()
    program = programs.record(compute, Padded(3, 8))
    assert same_bits(program.result[:3], expected[:3])
    for rows in (8, 1, 5):
        x += 1
        expected = compute()
        program.result.fill_(7.0)
        assert same_bits(program.replay(rows)[:rows], expected[:rows])
        assert (program.result[rows:] == 7.0).all(), "left out"


def test_a_padded_step_is_padded_everywhere(
    padded_step: tuple[Callable[[], Tensor], Tensor], programs: Programs
) -> None:
    with pytest.raises(NotRecordable, match="8 rows"):
        programs.record(padded_step[0], Padded(3, 16))


def test_each_call_is_reported_under_its_name(
    step: tuple[Callable[[], Tensor], Tensor], programs: Programs
) -> None:
    compute, _ = step
    seen: list[tuple[str, float]] = []
    timed = Programs(programs.library, lambda name, seconds: seen.append((name, seconds)))
    timed.capture(compute)()
    names = [name for name, _ in seen]
    assert names.count("add_rms_norm") == names.count("silu_mul") == 4
    assert all(seconds >= 0 for _, seconds in seen)


def test_a_step_that_looks_at_a_number_cannot_be_recorded(programs: Programs) -> None:
    with pytest.raises(NotRecordable, match="numbers"):
        programs.capture(lambda: torch.ones(2) * torch.ones(2).sum().item())
    with pytest.raises(NotRecordable, match="numbers"):
        programs.capture(lambda: torch.ones(2) if torch.ones(1) else torch.zeros(2))
    assert programs.library.recorder is None
    assert programs.capture(lambda: torch.ones(2) + 1)().tolist() == [2.0, 2.0]


def test_what_a_call_finds_wrong_is_raised_when_it_is_made_again(
    compiled: Backend, programs: Programs
) -> None:
    key, cache = torch.ones(1, 1, 4), torch.zeros(2, 1, 4, 4)
    slots = torch.tensor([3])

    def compute() -> Tensor:
        compiled.write_kv(key, key, cache, cache.clone(), slots)
        return cache + 0

    replay = programs.capture(compute)
    slots[0] = 8
    with pytest.raises(IndexError, match="slot"):
        replay()
    slots[0] = 7
    assert replay()[1, 0, 3].tolist() == [1.0] * 4


def test_an_arena_gives_out_what_came_back_and_nothing_twice() -> None:
    arena = Arena()
    held = [arena.allocate((3, 5), torch.float32) for _ in range(4)]
    assert len({tensor.data_ptr() for tensor in held}) == 4
    assert all(tensor.data_ptr() % 64 == 0 for tensor in held)
    view = held.pop()[1:].view(2, 5)
    assert arena.allocate((3, 5), torch.float32).data_ptr() != view.data_ptr() - 20
    freed = held.pop().data_ptr()
    assert arena.allocate((3, 5), torch.float32).data_ptr() == freed
    assert arena.allocate((0, 5), torch.int64).shape == (0, 5)
    assert arena.allocate((1 << 23,), torch.float32).numel() == 1 << 23
