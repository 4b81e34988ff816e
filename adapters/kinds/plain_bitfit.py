"""BitFit (arXiv:2106.10199): nothing but biases; see ``plain_delta`` and ``overrides``."""

from ..checkpoint import Checkpoint
from ..errors import AdapterCorrupt, shown
from ..formats.plain_delta import PlainDelta, PlainKind, read_mode, read_tensors
from ..kind import KindPage


def _read(checkpoint: Checkpoint) -> PlainDelta:
    tensors = read_tensors(checkpoint)
    for name in tensors:
        if not name.endswith(".bias"):
            raise AdapterCorrupt(f"{shown(name)} is no bias, and the config says 'bitfit'")
    return PlainDelta(tensors, read_mode(checkpoint.config))


KIND = PlainKind(
    name="bitfit",
    page=KindPage(
        title="BitFit (arXiv:2106.10199)",
        family="specification",
        files="biases by their names in the model's state_dict; fields delta_type 'bitfit', mode "
        "'replace' or 'add'",
        equation="y = W x + b', or W x + b + b'; the same for norms. Linear modules and norms that "
        "have no bias in the base get one",
        primitives=("Affine", "NormOverride"),
        memory="out numbers a linear module, 2 size a norm",
        limits="Biases only: use 'tensors' for anything else. PEFT's BitFit is LoRA with "
        "bias='all'.",
    ),
    read=_read,
)
