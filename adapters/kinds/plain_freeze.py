"""The last layers of a base that was frozen up to them; see ``plain_delta`` and ``overrides``."""

from ..checkpoint import Checkpoint
from ..formats.plain_delta import (
    PlainDelta,
    PlainKind,
    read_mode,
    read_tensors,
    require_last_layers,
)
from ..kind import KindPage


def _read(checkpoint: Checkpoint) -> PlainDelta:
    return PlainDelta(read_tensors(checkpoint), read_mode(checkpoint.config), require_last_layers)


KIND = PlainKind(
    name="freeze",
    page=KindPage(
        title="Freeze: the last k layers",
        family="specification",
        files="tensors of the last k layers, and of the last norm and the head, by their names in "
        "the model's state_dict; fields delta_type 'freeze', mode 'replace' or 'add'",
        equation="each tensor takes the place of the base's, or is added to it",
        primitives=("Affine", "Dense", "NormOverride"),
        memory="out in + 2 out numbers a replaced weight, out in an added one, size a norm's "
        "tensor; what equals the base costs nothing",
        limits="Each of the last k layers must have a tensor: another base's depth shows by that. "
        "The embedding and earlier layers are refused: use 'tensors'. Where head and embedding are "
        "one weight, the head is refused for this reason.",
    ),
    read=_read,
)
