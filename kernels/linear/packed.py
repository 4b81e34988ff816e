"""The products by oneDNN on weights packed once in the blocked layout of its kernels.

``functional.linear`` reads a bfloat16 weight as it lies in memory and reorders it at every call.
For few rows, where reading the weight is all the work, packing halves the time: a (3072, 576)
weight takes 91 us instead of 161 with one row, 380 instead of 553 with 16, the same with 512 (two
cores with AVX512-BF16). float32 goes to MKL, which gains nothing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..tables import SiteTargets
from .op import LinearOp
from .reference import prepare_linear as prepare_plain


@dataclass(frozen=True, slots=True)
class _PackedLinear:
    """``LinearOp`` on W in oneDNN's layout.

    Attributes:
        packed: W.
        bias: b (out,), None without one.
    """

    packed: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor, /) -> Tensor:
        """See ``LinearOp``."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y

    def per_target(self, inputs: Tensor, changed: Tensor, targets: SiteTargets, /) -> Tensor:
        """See ``LinearOp``.

        W is one, so the batch grows: changed rows are appended once more for each further target.
        """
        rows, count = inputs.shape[1], len(changed)
        y = self(torch.cat([inputs[0], *(x[changed] for x in inputs[1:])]))
        own: Tensor
        own, *appended = y.split([rows, *[count] * (len(inputs) - 1)])
        columns = zip(targets.out_starts[1:], targets.out_sizes[1:], strict=True)
        for (first, width), part in zip(columns, appended, strict=True):
            own[changed, first : first + width] = part[:, first : first + width]
        return own


def prepare_linear(weight: Tensor, bias: Tensor | None) -> LinearOp:
    """y = x Wᵀ + b, a bfloat16 weight packed where this build of torch has oneDNN for it."""
    if weight.dtype is not torch.bfloat16 or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return prepare_plain(weight, bias)
    return _PackedLinear(torch.ops.mkldnn._reorder_linear_weight(weight), bias)
