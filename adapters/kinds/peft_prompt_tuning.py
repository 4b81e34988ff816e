"""Prompt tuning (arXiv:2104.08691) as PEFT stores and computes it; see ``soft_prompt``."""

from ..formats.linear_adapter import PeftKind
from ..formats.soft_prompt import MAX_PROMPT, PROMPT_HARMLESS, prompt_rules, read_soft_prompt
from ..kind import KindPage

KIND = PeftKind(
    name="prompt_tuning",
    page=KindPage(
        title="Prompt tuning (arXiv:2104.08691)",
        family="addition",
        files="prompt_embeddings (P, hidden)",
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
            "prompt_tuning_init": "initialization only",
            "prompt_tuning_init_text": "initialization only",
            "tokenizer_name_or_path": "initialization only",
            "tokenizer_kwargs": "initialization only",
        }
    ),
    read=read_soft_prompt,
)
