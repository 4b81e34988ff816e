"""How a LoRA checkpoint stores the factors A and B of a difference B A, and back to them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import AdapterCorrupt, shown
from ..layout import LinearTarget
from .linear_adapter import require_shape


@dataclass(frozen=True, slots=True)
class Storage:
    """As they are, unless one of these says otherwise.

    Attributes:
        blocks_of_a: A is block-diagonal with so many blocks, stored one above another: BD-LoRA.
        blocks_of_b: The same for B.
        group_size: A reads means of so many inputs, times the number of groups: QA-LoRA
            (arXiv:2309.14717). PEFT computes so on a base quantized by GPTQ, and on others takes A
            as it is; its width tells which.
        of_parameter: B A is the difference of the weight as it is stored, which in GPT-2's
            ``Conv1D`` is Wᵀ, and in an embedding has a row a token.
    """

    blocks_of_a: int = 1
    blocks_of_b: int = 1
    group_size: int = 1
    of_parameter: bool = False

    def require(self, path: str, rank: int, a: Tensor, b: Tensor) -> None:
        """Check A (rank, in / blocks or groups) and B (out, rank / blocks).

        Raises:
            AdapterCorrupt: They have other shapes.
        """
        _require_divisible(path, rank, self.blocks_of_a)
        _require_divisible(path, rank, self.blocks_of_b)
        require_shape(path, "lora_A", a, rank, None)
        require_shape(path, "lora_B", b, None, rank // self.blocks_of_b)
        _require_divisible(path, b.shape[0], self.blocks_of_b)

    def features(self, target: LinearTarget, a: Tensor, b: Tensor) -> tuple[int, int]:
        """In and out of the module that the factors are for, told by their shapes."""
        width = a.shape[1] * self.blocks_of_a
        if width != target.in_features:
            width *= self.group_size
        return (b.shape[0], width) if self._is_swapped(target) else (width, b.shape[0])

    def factors(self, target: LinearTarget, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank) for the target, which has the features of ``features``."""
        if self._is_swapped(target):
            return b.T, a.T
        a, b = _diagonal(a, self.blocks_of_a), _diagonal(b, self.blocks_of_b)
        if a.shape[1] < target.in_features:
            groups = a.shape[1]
            a = a.repeat_interleave(self.group_size, dim=1) * (groups / self.group_size)
        return a, b

    def _is_swapped(self, target: LinearTarget) -> bool:
        """(B A)ᵀ = Aᵀ Bᵀ."""
        return self.of_parameter and target.is_transposed


def _diagonal(stored: Tensor, blocks: int) -> Tensor:
    if blocks == 1:
        return stored
    diagonal: Tensor = torch.block_diag(*stored.chunk(blocks))
    return diagonal


def _require_divisible(path: str, size: int, blocks: int) -> None:
    if size % blocks:
        raise AdapterCorrupt(
            f"the config field 'nblocks' is {blocks}, and does not divide the {size} rows that "
            f"{shown(path)} has"
        )
