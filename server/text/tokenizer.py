"""The base model's tokenizer, as the API needs it.

It is the Rust library alone, without transformers: that is several times cheaper a call than
transformers' wrapper around it, brings no torch into the HTTP process, and in ``encode_batch``
releases the interpreter lock, so that a long prompt tokenized in a thread does not hold up other
streams.
"""

import re
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer as Backend

from .chat_template import ChatTemplates
from .tokenizer_source import TokenizerSource

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Text to tokens and back; every method may be called from any thread.

    Attributes:
        source: What it was made from.
        end_token_ids: Tokens that end a text.
        vocab_size: One more than the largest token id.
        longest_token: Characters of the longest spelling.
    """

    def __init__(self, source: TokenizerSource) -> None:
        """Make it; of 50,000 tokens that takes 0.2 s."""
        self.source = source
        self.end_token_ids = source.end_token_ids
        self._backend = Backend.from_str(source.serialized)
        self._backend.encode_special_tokens = source.splits_special_tokens
        self._chat = ChatTemplates(source.chat_templates, source.special_tokens)
        added = self._backend.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._special = {token.content: one for one, token in added.items() if token.special}
        vocab = self._backend.get_vocab(True)
        self.vocab_size = max(vocab.values()) + 1
        self.longest_token = max(map(len, vocab))
        self._byte_level = "ByteLevel" in repr(self._backend.decoder)

    @property
    def has_chat_template(self) -> bool:
        """Whether the base knows conversations."""
        return bool(self.source.chat_templates)

    @property
    def chat_template(self) -> str:
        """The template that conversations with tools are rendered from, empty without any."""
        return self._chat.chosen(with_tools=True)

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
        return self._chat.render(messages, tools, add_generation_prompt, template_arguments or {})


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
