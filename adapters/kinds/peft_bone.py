"""Bone as PEFT 0.14 to 0.17 stored and computed it: MiSS under its first name (arXiv:2409.15371).

See ``shard_sharing``. PEFT 0.21.2 has no Bone any more, but the same computation as MiSS.
"""

from ..formats.config_fields import FieldRules
from ..formats.linear_adapter import PeftKind
from ..formats.shard_sharing import SHARD_HARMLESS, Variant, shard_sharing_reader
from ..kind import KindPage

KIND = PeftKind(
    name="bone",
    page=KindPage(
        title="Bone: block affine (MiSS under its first name, arXiv:2409.15371)",
        family="reparameterisation",
        files="bone_block of each module: (r, out); (out / r, r, r) with init_weights='bat'; "
        "fields r, init_weights",
        equation="As MiSS, without its mini variant",
        primitives=("Affine", "Dense"),
        memory="As MiSS",
        limits="Linear modules only, as in PEFT: not GPT-2's Conv1D. bat needs widths that r "
        "divides.",
    ),
    rules=FieldRules(
        implemented=frozenset({"r", "init_weights", "bias", "modules_to_save"}),
        harmless=SHARD_HARMLESS,
        refused={},
    ),
    read=shard_sharing_reader("bone_block", (Variant.PLAIN, Variant.BAT)),
)
