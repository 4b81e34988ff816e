"""MiSS (arXiv:2409.15371) as PEFT stores and computes it; see ``shard_sharing``."""

from ..formats.config_fields import FieldRules
from ..formats.linear_adapter import PeftKind
from ..formats.shard_sharing import SHARD_HARMLESS, Variant, shard_sharing_reader
from ..kind import KindPage

KIND = PeftKind(
    name="miss",
    page=KindPage(
        title="MiSS: matrix shard sharing (arXiv:2409.15371)",
        family="reparameterisation",
        files="miss_block of each module: (r, out); (r, mini_r) with init_weights='mini'; (out / "
        "r, r, r) with init_weights='bat'; fields r, mini_r, init_weights",
        equation="y += blockᵀ fold(x), fold(x)_j = sum of x_i over i mod r = j; mini repeats the "
        "block along the output; bat: W_ab += W_ab M_a + M_a for every r by r block of the base's "
        "weight",
        primitives=("Affine", "Dense"),
        memory="r out a module, and r in once for each width of input; bat: in out, because the "
        "difference depends on the base's whole weight",
        limits="Linear modules only, as in PEFT: not GPT-2's Conv1D. bat needs widths that r "
        "divides.",
    ),
    rules=FieldRules(
        implemented=frozenset({"r", "mini_r", "init_weights", "bias", "modules_to_save"}),
        harmless={**SHARD_HARMLESS, "miss_dropout": "off outside training"},
        refused={},
    ),
    read=shard_sharing_reader("miss_block", tuple(Variant)),
)
