"""Reads the tokenizer of a model folder with transformers, which knows every form of it.

transformers brings torch with it, so only the engine process imports this; it tells the HTTP
process what it has read.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from .chat_template import DEFAULT
from .tokenizer_source import TokenizerError, TokenizerSource


def read_tokenizer(folder: str | Path) -> TokenizerSource:
    """The tokenizer and the end tokens of the generation config of a model folder.

    Raises:
        TokenizerError: There is none, or none that can be served.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise TokenizerError(f"No tokenizer can be read from {folder}: {error}") from error
    return describe(tokenizer, _generation_end_tokens(Path(folder)))


def describe(tokenizer: Any, end_token_ids: Sequence[int] = ()) -> TokenizerSource:
    """A loaded tokenizer as data.

    Args:
        tokenizer: A ``PreTrainedTokenizerFast``.
        end_token_ids: End tokens beside the tokenizer's own.

    Raises:
        TokenizerError: It has no Rust backend.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise TokenizerError(
            f"The tokenizer {type(tokenizer).__name__} has no fast (tokenizer.json) form; "
            "convert it and save the tokenizer.json beside the model."
        )
    backend = tokenizer.backend_tokenizer
    # A prompt is neither cut nor filled, whatever the folder says.
    backend.no_truncation()
    backend.no_padding()
    own = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
    return TokenizerSource(
        serialized=backend.to_str(),
        splits_special_tokens=bool(backend.encode_special_tokens),
        special_tokens=dict(tokenizer.special_tokens_map),
        chat_templates=_templates(tokenizer.chat_template),
        end_token_ids=tuple(sorted({*own, *end_token_ids})),
    )


def _templates(found: str | dict[str, str] | None) -> dict[str, str]:
    if isinstance(found, dict):
        return dict(found)
    return {DEFAULT: found} if found else {}


def _generation_end_tokens(folder: Path) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    if not path.is_file():
        return ()
    try:
        ids = json.loads(path.read_text("utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise TokenizerError(f"{path} is not a generation config: {error}") from error
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (int(ids),)
