"""Times the compiled kernels beside the reference and beside the time its bytes take to be read.

    python -m deltamux.benchmarks.kernels [--threads N] [--seed N]

Shapes are those of SmolLM2-135M in bfloat16: a decode step of 16 sequences, each with an adapter of
its own, and a prefill of 512 tokens; then each other correction of a linear module, for a row alone
and for 128. Weights and caches of 30 layers are walked in turn, so that a decode step reads from
memory what it would read there. The last line is one JSON object.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from ..kernels.affine.op import Cell as AffineCell
from ..kernels.backend import Backend, DeltaOps, compiled_backend, reference_backend
from ..kernels.circulant.op import Cell as CirculantCell
from ..kernels.dense.op import Cell as DenseCell
from ..kernels.kronecker.op import Cell as KroneckerCell
from ..kernels.paged_attention.op import PagedBatch
from ..kernels.sparse.op import Cell as SparseCell
from ..kernels.tables import CorrectLinear, PrimitiveTable, Segments, SiteTargets
from .errors import BenchmarkError
from .machine import describe_machine, describe_versions

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, BLOCK = 30, 576, 1536, 9, 3, 64, 16
SITES = {
    "qkv": (HIDDEN, (576, 192, 192)),
    "o": (HIDDEN, (HIDDEN,)),
    "gate_up": (HIDDEN, (INNER, INNER)),
    "down": (INNER, (HIDDEN,)),
}
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One operation: ``run(backend, layer)``, and the bytes of weights or cache one layer reads."""

    name: str
    run: Callable[[Backend, int], object]
    num_bytes: int | None = None


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call, the best of several rounds; the floor is bytes over bandwidth."""

    name: str
    compiled_us: float
    reference_us: float
    floor_us: float | None


class Pool:
    """Tensors one after another, each at a multiple of 64 bytes, as adapters lie on the device."""

    def __init__(self) -> None:
        """Begin empty."""
        self._words: list[Tensor] = []
        self._used = 0

    def put(self, tensor: Tensor) -> int:
        """Where it begins, in elements of its own type."""
        words = torch.zeros(-(-tensor.nbytes // 64) * 16, dtype=torch.int32)
        words.view(tensor.dtype)[: tensor.numel()] = tensor.reshape(-1)
        self._words.append(words)
        self._used += words.nbytes
        return (self._used - words.nbytes) // tensor.element_size()

    def put_random(self, *shape: int) -> int:
        """Where a new tensor of numbers begins."""
        return self.put(torch.randn(*shape).to(DTYPE))

    def table(self, cells: Tensor) -> PrimitiveTable:
        """The table of these cells."""
        words = torch.cat(self._words)
        return PrimitiveTable(cells, words.view(DTYPE), words)


MakeCell = Callable[[Pool, int, int], tuple[int, ...]]
"""make(pool, in_size, out_size): one adapter on one target."""


def affine_cell(rank: int) -> MakeCell:
    """A LoRA."""
    return lambda pool, in_size, out_size: AffineCell(
        rank, pool.put_random(rank, in_size), pool.put_random(rank, out_size)
    )


def dense_cell(pool: Pool, in_size: int, out_size: int) -> DenseCell:
    """A whole matrix."""
    return DenseCell(pool.put_random(out_size, in_size))


def sparse_cell(entries: int) -> MakeCell:
    """Entries anywhere."""

    def make(pool: Pool, in_size: int, out_size: int) -> SparseCell:
        at = torch.randperm(in_size * out_size)[:entries].sort().values
        starts = torch.searchsorted(at, torch.arange(out_size + 1) * in_size).int()
        columns = (at % in_size).int()
        return SparseCell(entries, pool.put(starts), pool.put(columns), pool.put_random(entries))

    return make


def kronecker_cell(rank: int) -> MakeCell:
    """L (8, 8) and a whole or factored R."""

    def make(pool: Pool, in_size: int, out_size: int) -> KroneckerCell:
        k, n, left = out_size // 8, in_size // 8, pool.put_random(8, 8)
        if rank == 0:
            return KroneckerCell(8, 8, 0, left, pool.put_random(k, n))
        return KroneckerCell(8, 8, rank, left, pool.put_random(rank, n), pool.put_random(k, rank))

    return make


def circulant_cell(block: int) -> MakeCell:
    """Blocks of one size."""
    return lambda pool, in_size, out_size: CirculantCell(
        block, pool.put_random(out_size // block, in_size // block, block)
    )


CORRECTIONS: tuple[tuple[str, Callable[[DeltaOps], CorrectLinear], MakeCell], ...] = (
    ("affine rank 16", lambda deltas: deltas.correct_affine, affine_cell(16)),
    ("dense", lambda deltas: deltas.add_dense, dense_cell),
    ("sparse 16384 entries", lambda deltas: deltas.add_sparse, sparse_cell(16384)),
    ("spectral 1000 entries", lambda deltas: deltas.add_spectral, sparse_cell(1000)),
    ("kronecker 8x8", lambda deltas: deltas.add_kronecker, kronecker_cell(0)),
    ("kronecker 8x8 rank 16", lambda deltas: deltas.add_kronecker, kronecker_cell(16)),
    ("circulant blocks of 64", lambda deltas: deltas.add_circulant, circulant_cell(64)),
)


def correction_case(
    name: str,
    operation: Callable[[DeltaOps], CorrectLinear],
    make: MakeCell,
    site: tuple[int, tuple[int, ...]],
    rows_each: int,
    adapters: int = 1,
) -> Case:
    """Every adapter corrects ``rows_each`` rows at every target of the site."""
    in_size, widths = site
    pool = Pool()
    cells = [
        [make(pool, in_size, width) for _ in range(adapters)]
        for _ in range(LAYERS)
        for width in widths
    ]
    table = pool.table(torch.tensor(cells))
    starts = tuple(sum(widths[:t]) for t in range(len(widths)))
    targets = [SiteTargets(layer * len(widths), starts, widths) for layer in range(LAYERS)]
    segments = Segments.of(
        [(slot * rows_each, (slot + 1) * rows_each, slot, 1.0) for slot in range(adapters)]
    )
    x = torch.randn(adapters * rows_each, in_size).to(DTYPE)
    y = torch.zeros(adapters * rows_each, sum(widths), dtype=DTYPE)
    return Case(
        f"{name}, {in_size} -> {widths}, {adapters} x {rows_each} rows",
        lambda backend, layer: operation(backend.deltas)(y, x, table, targets[layer], segments),
        table.numbers.nbytes // LAYERS,
    )


def affine_case(site: str, rows_each: int, adapters: int, rank: int) -> Case:
    """LoRAs of one rank."""
    return correction_case(
        f"affine {site} rank {rank}",
        lambda deltas: deltas.correct_affine,
        affine_cell(rank),
        SITES[site],
        rows_each,
        adapters,
    )


def attention_case(sequences: int, q_len: int, context: int) -> Case:
    """Equal sequences over shuffled cache blocks."""
    per_sequence = -(-context // BLOCK)
    blocks = sequences * per_sequence
    caches = torch.randn(LAYERS, 2, blocks, KV_HEADS, BLOCK, HEAD_DIM).to(DTYPE)
    rows = torch.arange(0, (sequences + 1) * q_len, q_len, dtype=torch.int32)
    batch = PagedBatch(
        cu_seqlens_q=rows,
        context_starts=torch.zeros(sequences, dtype=torch.int32),
        context_lens=torch.full((sequences,), context, dtype=torch.int32),
        block_tables=torch.randperm(blocks, dtype=torch.int32).view(sequences, -1),
        slot_mapping=torch.zeros(sequences * q_len, dtype=torch.int64),
        max_seqlen_q=q_len,
        max_context_len=context,
    )
    query = torch.randn(sequences * q_len, HEADS, HEAD_DIM).to(DTYPE)
    return Case(
        f"paged_attention {sequences} x {q_len} rows, context {context}",
        lambda backend, layer: backend.paged_attention(
            query, caches[layer, 0], caches[layer, 1], batch, HEAD_DIM**-0.5, None
        ),
        caches.nbytes // LAYERS,
    )


def elementwise_cases(rows: int) -> Iterator[Case]:
    """The small operations between the GEMMs; their data stay in the caches."""
    hidden, weight = torch.randn(rows, HIDDEN).to(DTYPE), torch.ones(HIDDEN, dtype=DTYPE)
    residual = torch.zeros_like(hidden)
    gate_up = torch.randn(rows, 2 * INNER).to(DTYPE)
    qkv = torch.randn(rows, HEADS + 2 * KV_HEADS, HEAD_DIM).to(DTYPE)
    query, key = qkv[:, :HEADS], qkv[:, HEADS : HEADS + KV_HEADS]
    angle = torch.rand(rows, HEAD_DIM // 2)
    cos, sin = angle.cos(), angle.sin()
    yield Case(f"rms_norm {rows} rows", lambda b, _: b.rms_norm(hidden, weight, 1e-5))
    yield Case(
        f"add_rms_norm {rows} rows", lambda b, _: b.add_rms_norm(hidden, residual, weight, 1e-5)
    )
    yield Case(f"rotary {rows} rows", lambda b, _: b.rotary(query, key, cos, sin))
    yield Case(f"silu_mul {rows} rows", lambda b, _: b.silu_mul(gate_up))


def cases() -> Iterator[Case]:
    """Decode, then prefill; then every correction."""
    for site in SITES:
        yield affine_case(site, rows_each=1, adapters=16, rank=16)
    yield attention_case(sequences=16, q_len=1, context=200)
    yield from elementwise_cases(16)
    for rank in (16, 64):
        yield affine_case("gate_up", rows_each=512, adapters=1, rank=rank)
    yield attention_case(sequences=1, q_len=512, context=512)
    yield from elementwise_cases(512)
    for width in (HIDDEN, INNER):
        for rows in (1, 128):
            for name, operation, make in CORRECTIONS:
                yield correction_case(name, operation, make, (HIDDEN, (width,)), rows)


def best_seconds(run: Callable[[int], object], rounds: int) -> float:
    """Seconds of one call: the best round of LAYERS calls."""

    def one_round() -> float:
        started = time.perf_counter()
        for layer in range(LAYERS):
            run(layer)
        return (time.perf_counter() - started) / LAYERS

    return min(one_round() for _ in range(rounds))


def read_bandwidth() -> float:
    """Bytes a second at which torch sums 256 MB."""
    data: Tensor = torch.ones(64 << 20)
    return data.nbytes / best_seconds(lambda _: data.sum(), rounds=1)


def time_cases(text: str, bandwidth: float) -> Iterator[Timing]:
    """Of the cases whose name contains ``text``, one after another."""
    compiled, reference = compiled_backend(), reference_backend()
    for case in cases():
        if text in case.name:
            yield Timing(
                case.name,
                1e6 * best_seconds(partial(case.run, compiled), rounds=7),
                1e6 * best_seconds(partial(case.run, reference), rounds=1),
                1e6 * case.num_bytes / bandwidth if case.num_bytes else None,
            )


def run(threads: int | None = None, seed: int = 0, text: str = "") -> None:
    """Measure and print.

    Args:
        threads: Of torch and of the compiled kernels; as many as torch takes by itself.
        seed: Of the operands.
        text: Only cases whose name contains it are measured.

    Raises:
        BenchmarkError: There are none.
    """
    torch.set_num_threads(threads or torch.get_num_threads())
    torch.manual_seed(seed)
    bandwidth = read_bandwidth()
    timings = []
    for timing in time_cases(text, bandwidth):
        timings.append(timing)
        floor = f", floor {timing.floor_us:.1f}" if timing.floor_us else ""
        print(f"{timing.name}: {timing.compiled_us:.1f} us, {timing.reference_us:.1f}{floor}")
    if not timings:
        raise BenchmarkError(f"no case has {text!r} in its name")
    report = {
        "benchmark": "kernels",
        "machine": describe_machine(),
        "versions": describe_versions("torch"),
        "seed": seed,
        "threads": torch.get_num_threads(),
        "dtype": str(DTYPE),
        "read_bytes_per_second": bandwidth,
        "timings": [asdict(timing) for timing in timings],
    }
    print(json.dumps(report))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    run(options.threads, options.seed)


if __name__ == "__main__":
    main()
