"""The base model's tokenizer, as the API needs it.

transformers reads the folder; text and tokens then go straight to its Rust backend, which is
several times cheaper a call than transformers' own wrapper and, in ``encode_batch``, releases the
interpreter lock, so that a long prompt tokenized in a thread does not hold up other streams.
"""

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_TEMPLATE_OWN_ARGUMENTS = frozenset(
    inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters
)


class TokenizerError(Exception):
    """The folder holds no tokenizer that can be served; the message says what it holds."""


class ChatTemplateError(Exception):
    """The conversation does not fit the model's chat template, or there is none."""


class Tokenizer:
    """Text to tokens and back; every method may be called from any thread."""

    def __init__(self, tokenizer: Any, end_token_ids: Sequence[int] = ()) -> None:
        """Wrap a loaded tokenizer.

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
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        own = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
        self.end_token_ids = tuple(sorted({*own, *end_token_ids}))
        added: dict[int, Any] = tokenizer.added_tokens_decoder
        self._added = {token_id: str(token.content) for token_id, token in added.items()}
        self._special = {str(each.content): one for one, each in added.items() if each.special}
        vocab: dict[str, int] = self._backend.get_vocab(True)
        self.vocab_size = max(vocab.values()) + 1
        self.longest_token = max(map(len, vocab))
        decoder = json.loads(self._backend.to_str())["decoder"]
        self._byte_level = "ByteLevel" in json.dumps(decoder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read the tokenizer and the generation config of a model folder.

        Raises:
            TokenizerError: There is none, or none that can be served.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise TokenizerError(f"No tokenizer can be read from {folder}: {error}") from error
        return cls(tokenizer, _generation_end_tokens(Path(folder)))

    @property
    def has_chat_template(self) -> bool:
        """Whether the base knows conversations."""
        return bool(self._tokenizer.chat_template)

    def serialized(self) -> str:
        """The whole tokenizer as the text of a tokenizer.json."""
        return str(self._backend.to_str())

    @property
    def chat_template(self) -> str:
        """The template that conversations with tools are rendered from, empty without any."""
        found = self._tokenizer.chat_template or ""
        return str(found.get("tool_use", "")) if isinstance(found, dict) else str(found)

    def special_id(self, text: str) -> int | None:
        """The special token that is written so, if there is one; it is no part of any text."""
        return self._special.get(text)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the model's own first tokens unless told otherwise."""
        [encoding] = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of tokens; ids without a token have none."""
        return str(self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def token(self, token_id: int) -> str:
        """The vocabulary's own spelling of a token, empty where there is none."""
        return str(self._backend.id_to_token(token_id) or "")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for inside a text; joined, they are the text's bytes."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self.token(token_id)
        if self._byte_level:
            return bytes(_BYTE_OF[sign] for sign in token)
        byte = _BYTE_TOKEN.fullmatch(token)
        return bytes.fromhex(byte[1]) if byte else token.replace("\u2581", " ").encode()

    def token_text(self, token_id: int) -> str:
        """Text of one token by itself; bytes that are no whole character become U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        template_arguments: Mapping[str, object] | None = None,
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        """The prompt text the model's chat template makes of a conversation.

        ``tools`` are those that the model may call.

        Raises:
            ChatTemplateError: No template, a conversation the template refuses, or an argument
                that is not the template's.
        """
        if not self.has_chat_template:
            raise ChatTemplateError(
                "The base model has no chat template; use /v1/completions with a prompt."
            )
        arguments = dict(template_arguments or {})
        if reserved := sorted(_TEMPLATE_OWN_ARGUMENTS & arguments.keys()):
            raise ChatTemplateError(f"chat_template_kwargs may not set {reserved[0]!r}.")
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages,
                    tools=tools,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    **arguments,
                )
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ChatTemplateError(f"The chat template refuses this: {error}") from error


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


def _byte_of_sign() -> dict[str, int]:
    """Inverse of the alphabet of byte-level BPE (Radford et al. 2019).

    Printable Latin-1 characters stand for their own byte, the other bytes for the characters from
    U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    signs = {chr(byte): byte for byte in printable}
    return signs | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_of_sign()
