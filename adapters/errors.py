"""Why an adapter is refused.

AdapterError
├── AdapterNotFound       there is no adapter folder at the path
├── AdapterCorrupt        a file is missing, truncated, unreadable, or holds NaN or Inf
├── AdapterUnsupported    a kind, configuration field or file format that is not served; names it
├── AdapterMismatch       made for another base: an unknown module, or a shape that does not fit
└── AdapterTooLarge       good in itself, larger than the memory it would have to live in
"""


class AdapterError(Exception):
    """An adapter that will not be served: what was wrong, where, and what to do."""


class AdapterNotFound(AdapterError):
    """There is no adapter folder at the path."""


class AdapterCorrupt(AdapterError):
    """A file of the adapter is missing, truncated, unreadable, or holds NaN or Inf."""


class AdapterUnsupported(AdapterError):
    """A kind, configuration field or file format that is not served; the message names it."""


class AdapterMismatch(AdapterError):
    """The adapter was made for another base: an unknown module or a shape that does not fit."""


class AdapterTooLarge(AdapterError):
    """The adapter alone exceeds the memory tier it would have to live in."""


def shown(value: object, limit: int = 200) -> str:
    """The value as it appears in a message: an adapter's files may hold a megabyte of it."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
