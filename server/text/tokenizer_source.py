"""What a tokenizer is made from: read by the process that has transformers, used by the other."""

import msgspec


class TokenizerError(Exception):
    """The folder holds no tokenizer that can be served; the message says what it holds."""


class TokenizerSource(msgspec.Struct, frozen=True, kw_only=True):
    """A base's tokenizer as data; it can be sent to another process.

    Attributes:
        serialized: A tokenizer.json.
        splits_special_tokens: Whether a special token that is written in a text is taken for text.
        special_tokens: Those that have names, as chat templates know them: ``bos_token``, ...
        chat_templates: By name; where there is only one, it is called ``default``.
        end_token_ids: What ends a text, in ascending order.
    """

    serialized: str
    splits_special_tokens: bool
    special_tokens: dict[str, str]
    chat_templates: dict[str, str]
    end_token_ids: tuple[int, ...]
