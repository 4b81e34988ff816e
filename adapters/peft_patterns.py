"""PEFT's ``rank_pattern`` and ``alpha_pattern``: values for the modules that a pattern matches.

The patterns are regular expressions out of a stranger's file, and Python's engine can be made to
backtrack for years while it holds the interpreter; so what makes it backtrack is limited.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import AdapterCorrupt, AdapterUnsupported, shown

MAX_PATTERNS = 4096
MAX_PATTERN_LENGTH = 512
MAX_PATH_LENGTH = 128
MAX_CHOICES = 3

# Where the engine may have to come back and try another way; an escaped one counts as well.
_CHOICE = re.compile(r"[*+?{(]")
_REPEATED_GROUP = re.compile(r"\)[*+{]")


@dataclass(frozen=True, slots=True)
class Patterns:
    """One pattern field, in the order of the file.

    Attributes:
        values: Pattern -> value.
        compiled: Pattern -> its compiled expression.
    """

    values: Mapping[str, object]
    compiled: Mapping[str, re.Pattern[str]]

    @classmethod
    def read(cls, config: Mapping[str, object], name: str) -> "Patterns":
        """The field of this name, empty where it is missing or null.

        Raises:
            AdapterCorrupt: It is not an object, or a key is not a regular expression.
            AdapterUnsupported: A pattern could take forever to match.
        """
        values = config.get(name) or {}
        if not isinstance(values, dict):
            raise AdapterCorrupt(f"the config field {name!r} is {shown(values)}, not an object")
        if len(values) > MAX_PATTERNS:
            raise AdapterUnsupported(f"{name!r} holds more than {MAX_PATTERNS} patterns")
        return cls(values, {pattern: _compile(name, pattern) for pattern in values})

    def first_match(self, path: str) -> str | None:
        """First pattern that matches the path, or a dotted end of it, in full."""
        return next((key for key, regex in self.compiled.items() if regex.match(path)), None)


def _compile(name: str, pattern: str) -> re.Pattern[str]:
    if (
        len(pattern) > MAX_PATTERN_LENGTH
        or len(_CHOICE.findall(pattern)) > MAX_CHOICES
        or _REPEATED_GROUP.search(pattern)
    ):
        raise AdapterUnsupported(
            f"{name!r} holds the pattern {shown(pattern)}, which may take too long to match: write "
            f"module paths, with at most {MAX_CHOICES} repeats or groups, and no repeated group"
        )
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise AdapterCorrupt(f"{name!r} holds the bad pattern {shown(pattern)}: {error}") from error
