"""The operation of ``op``: transforms by torch, the sparse product by any ``add_sparse``."""

import torch
from torch import Tensor

from ..tables import CorrectLinear, PrimitiveTable, Segments, SiteTargets


class SpectralCorrection:
    """y[i:j, columns(t)] += w Re(ifft(S(t, s) ifft(x[i:j]))), transformed in float32."""

    def __init__(self, add_sparse: CorrectLinear) -> None:
        """Multiply by S with ``add_sparse``, given float32 rows whatever the pool's dtype."""
        self._add_sparse = add_sparse

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
        _check(table, targets, segments, x.shape[0])
        row, packed = _rows_with_cells(table, targets, segments)
        if row.numel() == 0:
            return
        frequencies = torch.fft.ifft(x[row].float())
        sums = torch.zeros(2 * row.numel(), y.shape[1], device=y.device)
        self._add_sparse(sums, _as_rows(frequencies), table, targets, _twice(packed, row.numel()))
        complex_sums = torch.complex(*sums.chunk(2))
        for first, width in zip(targets.out_starts, targets.out_sizes, strict=True):
            columns = slice(first, first + width)
            delta = torch.fft.ifft(complex_sums[:, columns]).real
            y[row, columns] = (y[row, columns].float() + delta).to(y.dtype)


def _check(table: PrimitiveTable, targets: SiteTargets, segments: Segments, rows: int) -> None:
    if targets.first + len(targets.out_starts) > table.cells.shape[0]:
        raise IndexError("add_spectral: a target lies outside the table's rows")
    inside = (segments.start >= 0) & (segments.start <= segments.end) & (segments.end <= rows)
    if not bool(inside.all()):
        raise IndexError("add_spectral: a segment reaches outside the batch's rows")


def _rows_with_cells(
    table: PrimitiveTable, targets: SiteTargets, segments: Segments
) -> tuple[Tensor, Segments]:
    """Rows of the segments that have a cell, and these segments over those rows alone."""
    cells = table.cells[targets.first : targets.first + len(targets.out_starts), :, 0]
    found = (cells >= 0).any(0)[segments.adapter_slot]
    start, length = segments.start[found], (segments.end - segments.start)[found]
    end = length.cumsum(0, dtype=torch.int32)
    shift = torch.repeat_interleave(start - (end - length), length)
    row = torch.arange(shift.numel(), device=shift.device) + shift
    weight, slot = segments.weight[found], segments.adapter_slot[found]
    return row, Segments(end - length, end, slot, weight)


def _as_rows(frequencies: Tensor) -> Tensor:
    """(rows, n) complex -> (2 rows, n): all real parts, then all imaginary ones."""
    return torch.cat((frequencies.real, frequencies.imag))


def _twice(segments: Segments, rows: int) -> Segments:
    """The segments, and after them the same ones ``rows`` further down."""
    return Segments(
        torch.cat((segments.start, segments.start + rows)),
        torch.cat((segments.end, segments.end + rows)),
        segments.adapter_slot.repeat(2),
        segments.weight.repeat(2),
    )
