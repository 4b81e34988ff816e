"""The formula of ``op`` in plain torch, in float32."""

import torch
from torch import Tensor

from ..cells import CellRows, add_weighted
from ..sparse.reference import times_entries
from ..tables import PrimitiveTable, Segments, SiteTargets


def add_spectral(
    y: Tensor, x: Tensor, table: PrimitiveTable, targets: SiteTargets, segments: Segments
) -> None:
    """y[i:j, columns(t)] += w Re(ifft(S(t, s) ifft(x[i:j])))."""
    add_weighted(y, x, table, targets, segments, _delta)


def _delta(x: Tensor, found: CellRows, width: int) -> Tensor:
    bins = torch.fft.ifft(x)
    real, imaginary = (times_entries(part, found, width) for part in (bins.real, bins.imag))
    delta: Tensor = torch.fft.ifft(torch.complex(real, imaginary)).real
    return delta
