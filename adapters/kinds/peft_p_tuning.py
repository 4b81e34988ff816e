"""P-tuning (arXiv:2103.10385) as PEFT stores and computes it; see ``soft_prompt``.

The prompt encoder, an MLP or an LSTM, serves training: PEFT applies it when it saves.
"""

from ..formats.linear_adapter import PeftKind
from ..formats.soft_prompt import MAX_PROMPT, PROMPT_HARMLESS, prompt_rules, read_soft_prompt
from ..kind import KindPage

_APPLIED = "of the encoder, which PEFT applies before it saves"

KIND = PeftKind(
    name="p_tuning",
    page=KindPage(
        title="P-tuning (arXiv:2103.10385), with MLP or LSTM encoder",
        family="addition",
        files="prompt_embeddings (P, hidden), the encoder's output",
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
            "encoder_reparameterization_type": _APPLIED,
            "encoder_hidden_size": _APPLIED,
            "encoder_num_layers": _APPLIED,
            "encoder_dropout": _APPLIED,
        }
    ),
    read=read_soft_prompt,
)
