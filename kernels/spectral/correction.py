"""The operation of ``op``: transforms by torch, the sparse product by any ``add_sparse``."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..tables import CorrectLinear, PrimitiveTable, Segments, SiteTargets


@dataclass(frozen=True, slots=True)
class _SpectralRows:
    """The rows of a batch that are transformed, one after another.

    Attributes:
        of: What they were found for: the batch's segments, and which slots have a cell.
        index: Their places in the batch.
        count: How many they are.
        twice: Segments over all their real parts, and then over all their imaginary ones.
    """

    of: tuple[Segments, Tensor]
    index: slice | Tensor
    count: int
    twice: Segments


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
            IndexError: A segment, a target, a cell or an index reaches outside its tensor.
        """
        rows = self._rows(_slots_with_cells(table, targets), segments)
        if rows.count == 0:
            return
        frequencies = torch.fft.ifft(_inside(x, rows).float())
        parts = torch.cat((frequencies.real, frequencies.imag))
        sums = torch.zeros(2 * rows.count, y.shape[1], device=y.device)
        self._add_sparse(sums, parts, table, targets, rows.twice)
        complex_sums = torch.complex(*sums.chunk(2))
        for first, width in zip(targets.out_starts, targets.out_sizes, strict=True):
            columns = slice(first, first + width)
            delta = torch.fft.ifft(complex_sums[:, columns]).real
            y[rows.index, columns] = (y[rows.index, columns].float() + delta).to(y.dtype)

    def _rows(self, slots: Tensor, segments: Segments) -> _SpectralRows:
        latest = self._latest
        if latest is None or latest.of[0] is not segments or not torch.equal(latest.of[1], slots):
            latest = self._latest = _find_rows(slots, segments)
        return latest


def _slots_with_cells(table: PrimitiveTable, targets: SiteTargets) -> Tensor:
    end = targets.first + len(targets.out_starts)
    if targets.first < 0 or end > table.cells.shape[0]:
        raise IndexError("add_spectral: a target lies outside the table's rows")
    return (table.cells[targets.first : end, :, 0] >= 0).any(0)


def _find_rows(slots: Tensor, segments: Segments) -> _SpectralRows:
    if bool(((segments.start < 0) | (segments.start > segments.end)).any()):
        raise IndexError("add_spectral: a segment reaches outside the batch's rows")
    found = slots[segments.adapter_slot]
    start, length = segments.start[found], (segments.end - segments.start)[found]
    end = length.cumsum(0, dtype=torch.int32)
    shift = torch.repeat_interleave(start - (end - length), length)
    index = torch.arange(shift.numel(), device=shift.device) + shift
    count = index.numel()
    twice = Segments(
        torch.cat((end - length, end - length + count)),
        torch.cat((end, end + count)),
        segments.adapter_slot[found].repeat(2),
        segments.weight[found].repeat(2),
    )
    return _SpectralRows((segments, slots), _as_slice(index), count, twice)


def _as_slice(index: Tensor) -> slice | Tensor:
    """The same rows as a slice, if they follow one another: then nothing is copied to find them."""
    if index.numel() and bool((index.diff() == 1).all()):
        return slice(int(index[0]), int(index[-1]) + 1)
    return index


def _inside(x: Tensor, rows: _SpectralRows) -> Tensor:
    if isinstance(rows.index, slice) and rows.index.stop > x.shape[0]:
        raise IndexError("add_spectral: a segment reaches outside the batch's rows")
    return x[rows.index]
