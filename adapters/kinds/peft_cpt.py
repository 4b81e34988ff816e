"""Context-aware prompt tuning (arXiv:2410.17222), PEFT's; see ``soft_prompt``.

The rows begin as the embeddings of a prompt's tokens; PEFT adds what was trained, projected into a
ball around them, when it saves.
"""

from ..checkpoint import Checkpoint
from ..errors import AdapterCorrupt
from ..formats.linear_adapter import PeftKind
from ..formats.soft_prompt import (
    MAX_PROMPT,
    PROMPT_HARMLESS,
    SoftPrompt,
    prompt_rules,
    read_soft_prompt,
)
from ..kind import KindPage

_PER_TOKEN = ("cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask")
_TRAINING = "of the loss"
_APPLIED = "of the projection, which PEFT applies before it saves"


def _read(checkpoint: Checkpoint) -> SoftPrompt:
    prompt = read_soft_prompt(checkpoint)
    for name in _PER_TOKEN:
        value = checkpoint.config.get(name)
        # PEFT takes the prompt's length from cpt_token_ids, and the others must be as long.
        if value is not None and not (isinstance(value, list) and len(value) == len(prompt.rows)):
            raise AdapterCorrupt(
                f"the config field {name!r} is not a list of {len(prompt.rows)} entries, as many "
                f"as the prompt has rows"
            )
    return prompt


KIND = PeftKind(
    name="cpt",
    page=KindPage(
        title="Context-aware prompt tuning (CPT, arXiv:2410.17222)",
        family="addition",
        files="prompt_embeddings (P, hidden), the trained difference added; field cpt_token_ids",
        equation="the P rows stand before the embedded tokens; token i has position P + i",
        primitives=("KVPrefix",),
        memory="2 layers kv_heads head_dim P numbers, in blocks of the KV cache that all requests "
        "share; computed once when the adapter is loaded",
        limits=f"P is at most {MAX_PROMPT} and below the base's longest sequence. modules_to_save "
        "may hold the last norm and the head, which the prompt does not pass.",
    ),
    rules=prompt_rules(
        {
            **PROMPT_HARMLESS,
            "opt_weighted_loss_type": _TRAINING,
            "opt_loss_decay_factor": _TRAINING,
            "opt_projection_epsilon": _APPLIED,
            "opt_projection_format_epsilon": _APPLIED,
            "tokenizer_name_or_path": "initialization only",
        },
        _PER_TOKEN,
    ),
    read=_read,
)
