"""Any tensors of the base, replaced or added to; see ``plain_delta`` and ``overrides``."""

from ..checkpoint import Checkpoint
from ..formats.plain_delta import PlainDelta, PlainKind, read_mode, read_tensors
from ..kind import KindPage


def _read(checkpoint: Checkpoint) -> PlainDelta:
    return PlainDelta(read_tensors(checkpoint), read_mode(checkpoint.config))


KIND = PlainKind(
    name="tensors",
    page=KindPage(
        title="Tensors: any part of a fine-tuned model",
        family="specification",
        files="tensors by their names in the model's state_dict, with their shapes there; fields "
        "delta_type 'tensors', mode 'replace' or 'add'",
        equation="each tensor takes the place of the base's, or is added to it; biases also where "
        "the base has none",
        primitives=("Affine", "Dense", "NormOverride", "EmbeddingRows"),
        memory="out in + 2 out numbers a replaced weight, out in an added one, out a bias, size a "
        "norm's tensor, hidden each changed row of an embedding; what equals the base costs "
        "nothing",
        limits="A vocabulary of another size is refused. Where head and embedding are one weight, "
        "the delta must name both or neither.",
    ),
    read=_read,
)
