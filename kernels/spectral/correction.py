"""The operation of ``op``: transforms by torch, the sparse product by any ``add_sparse``."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..tables import CorrectLinear, PrimitiveTable, Segments, SiteTargets

BLOCK_ROWS = 64
"""Rows that are transformed at once: what they become stays in the caches."""


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows of a batch that are transformed at once.

    Attributes:
        rows: Their places in the batch.
        parts: Segments over their real and imaginary parts, one after the other for each row.
    """

    rows: slice | Tensor
    parts: Segments


@dataclass(frozen=True, slots=True)
class _SpectralRows:
    """All rows of a batch that are transformed.

    Attributes:
        segments: The batch's.
        slots: Which slots have a cell.
        blocks: What was found for these two.
    """

    segments: Segments
    slots: Tensor
    blocks: tuple[_Block, ...]


class SpectralCorrection:
    """y[i:j, columns(t)] += w Re(ifft(S(t, s) ifft(x[i:j]))), transformed in float32."""

    def __init__(self, add_sparse: CorrectLinear) -> None:
        """Multiply by S with ``add_sparse``, given float32 rows whatever the pool's dtype."""
        self._add_sparse = add_sparse
        self._latest: _SpectralRows | None = None  # mostly the same at all sites of a step

    def __call__(
        self,
        y: Tensor,
        x: Tensor,
        table: PrimitiveTable,
        targets: SiteTargets,
        segments: Segments,
    ) -> None:
        """Only rows whose adapter has a cell at one of the targets are transformed.

        Raises:
            IndexError: A segment, a target, a cell or an index reaches outside its tensor. Rows of
                ``y`` may then have been changed.
        """
        for block in self._blocks(_slots_with_cells(table, targets), segments):
            frequencies = torch.fft.ifft(_inside(x, block.rows).float())
            parts = torch.stack((frequencies.real, frequencies.imag), dim=1).flatten(0, 1)
            sums = torch.zeros(len(parts), y.shape[1], device=y.device)
            self._add_sparse(sums, parts, table, targets, block.parts)
            complex_sums = torch.complex(sums[::2], sums[1::2])
            for first, width in zip(targets.out_starts, targets.out_sizes, strict=True):
                columns = slice(first, first + width)
                y[block.rows, columns] += torch.fft.ifft(complex_sums[:, columns]).real

    def _blocks(self, slots: Tensor, segments: Segments) -> tuple[_Block, ...]:
        latest = self._latest
        if latest is None or latest.segments is not segments or not latest.slots.equal(slots):
            blocks = tuple(_find_blocks(slots, segments))
            latest = self._latest = _SpectralRows(segments, slots, blocks)
        return latest.blocks


def _slots_with_cells(table: PrimitiveTable, targets: SiteTargets) -> Tensor:
    end = targets.first + len(targets.out_starts)
    if targets.first < 0 or end > table.cells.shape[0]:
        raise IndexError("add_spectral: a target lies outside the table's rows")
    return (table.cells[targets.first : end, :, 0] >= 0).any(0)


def _find_blocks(slots: Tensor, segments: Segments) -> Iterator[_Block]:
    if bool(((segments.start < 0) | (segments.start > segments.end)).any()):
        raise IndexError("add_spectral: a segment reaches outside the batch's rows")
    found = slots[segments.adapter_slot]
    start, length = segments.start[found], (segments.end - segments.start)[found]
    end = length.cumsum(0, dtype=torch.int32)
    shift = torch.repeat_interleave(start - (end - length), length)
    index = torch.arange(shift.numel(), device=shift.device) + shift
    for first in range(0, index.numel(), BLOCK_ROWS):
        parts = Segments(
            2 * (end - length - first).clamp(0, BLOCK_ROWS),
            2 * (end - first).clamp(0, BLOCK_ROWS),
            segments.adapter_slot[found],
            segments.weight[found],
            segments.rows,
            2 * BLOCK_ROWS,
            segments.max_inner,
        )
        yield _Block(_as_slice(index[first : first + BLOCK_ROWS]), parts)


def _as_slice(index: Tensor) -> slice | Tensor:
    """The same rows as a slice, if they follow one another: then nothing is copied to find them."""
    if bool((index.diff() == 1).all()):
        return slice(int(index[0]), int(index[-1]) + 1)
    return index


def _inside(x: Tensor, rows: slice | Tensor) -> Tensor:
    if isinstance(rows, slice) and rows.stop > x.shape[0]:
        raise IndexError("add_spectral: a segment reaches outside the batch's rows")
    return x[rows]
