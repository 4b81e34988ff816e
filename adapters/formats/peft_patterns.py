"""PEFT's ``rank_pattern`` and ``alpha_pattern``: values for the modules that a pattern matches.

A pattern is a regular expression for a module's path or a dotted end of it, and the first in the
file's order counts. The patterns come out of a stranger's file, and Python's engine backtracks
while it holds the interpreter. So module names and paths, which is what most are, are looked up
without that engine; of true expressions only a few are allowed, and none with many ways to match.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..errors import AdapterCorrupt, AdapterUnsupported, shown

MAX_PATTERNS = 4096
MAX_PATTERN_LENGTH = 512
MAX_PATH_LENGTH = 128
MAX_SHAPES = 64
MAX_EXPRESSIONS = 16
MAX_GROUPS = 3
MAX_WAYS = 512
MAX_WORK = 1 << 22

# Names with dots between them, each perhaps escaped.
_LITERAL = re.compile(r"(?:[\w-]|\\?[.-])*")
_ESCAPED = re.compile(r"\\(.)")
# Escaped ones count as well.
_REPEAT = re.compile(r"[*+{]")
_REPEATED_GROUP = re.compile(r"\)[*+{]")
# Greedy, and no other repeat of a repeat.
_LEADING = re.compile(r"\.\*(?![*+?{])")
# Lookarounds, conditions, references to groups, and whatever else begins with "(?".
_BEYOND = re.compile(r"\(\?(?!:)|\\\d")
# A repetition with its backtracking costs about as much as this many alternatives.
_REPEAT_WAYS = 32

_Shape = tuple[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Patterns:
    """One pattern field, in the order of the file.

    Attributes:
        values: Pattern -> value.
    """

    values: Mapping[str, object]
    _order: Mapping[str, int]
    _literals: Mapping[_Shape, Mapping[str, str]]
    _expressions: Mapping[str, re.Pattern[str]]

    @classmethod
    def read(cls, config: Mapping[str, object], name: str, num_paths: int) -> "Patterns":
        """The field of this name, empty where it is missing or null, to match ``num_paths`` paths.

        Raises:
            AdapterCorrupt: It is not an object, or a key is not a regular expression.
            AdapterUnsupported: The patterns could take too long to match.
        """
        values = config.get(name) or {}
        if not isinstance(values, dict):
            raise AdapterCorrupt(f"the config field {name!r} is {shown(values)}, not an object")
        if len(values) > MAX_PATTERNS:
            raise AdapterUnsupported(f"{name!r} holds more than {MAX_PATTERNS} patterns")
        for pattern in values:
            _require_short(name, pattern)
        expressions = [pattern for pattern in values if not _LITERAL.fullmatch(pattern)]
        literals = _by_shape(pattern for pattern in values if _LITERAL.fullmatch(pattern))
        _require_little_work(name, literals, expressions, num_paths)
        compiled = {pattern: _compile(name, pattern) for pattern in expressions}
        return cls(values, {key: i for i, key in enumerate(values)}, literals, compiled)

    def first_match(self, path: str) -> str | None:
        """First pattern that matches the path, or a dotted end of it, in full."""
        if not self.values:
            return None
        return min(self._matches(path), key=self._order.__getitem__, default=None)

    def _matches(self, path: str) -> Iterator[str]:
        """Every literal that matches, and the first expression that does."""
        ends = {len(end): end for end in _dotted_ends(path)}
        for (length, dots), literals in self._literals.items():
            found = literals.get(_with_dots(ends[length], dots)) if length in ends else None
            if found is not None:
                yield found
        found = next((key for key, regex in self._expressions.items() if regex.match(path)), None)
        if found is not None:
            yield found


def _by_shape(patterns: Iterator[str]) -> dict[_Shape, dict[str, str]]:
    """Shape -> text -> the first pattern of both.

    An unescaped dot matches any character. The shape is the length and the positions of those dots:
    a pattern matches a text of its length that equals its own once there are dots in these places.
    """
    shapes: dict[_Shape, dict[str, str]] = {}
    for pattern in patterns:
        # Escaped dots are set aside for a moment as a character that no literal holds.
        text = _ESCAPED.sub(lambda match: "/" if match[1] == "." else match[1], pattern)
        dots = tuple(i for i, character in enumerate(text) if character == ".")
        shapes.setdefault((len(text), dots), {}).setdefault(text.replace("/", "."), pattern)
    return shapes


def _dotted_ends(path: str) -> Iterator[str]:
    yield path
    for position, character in enumerate(path):
        if character == ".":
            yield path[position + 1 :]


def _with_dots(text: str, positions: Sequence[int]) -> str:
    characters = list(text)
    for position in positions:
        characters[position] = "."
    return "".join(characters)


def _require_short(name: str, pattern: str) -> None:
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise AdapterUnsupported(
            f"{name!r} holds the pattern {shown(pattern)} of {len(pattern)} characters, more than "
            f"{MAX_PATTERN_LENGTH}"
        )


def _require_little_work(
    name: str,
    literals: Mapping[_Shape, Mapping[str, str]],
    expressions: Sequence[str],
    num_paths: int,
) -> None:
    if len(literals) > MAX_SHAPES or len(expressions) > MAX_EXPRESSIONS:
        raise AdapterUnsupported(
            f"{name!r} holds {len(expressions)} regular expressions and module paths of "
            f"{len(literals)} shapes, more than {MAX_EXPRESSIONS} and {MAX_SHAPES}: write the "
            f"modules' own names, without special characters"
        )
    work = num_paths * (len(literals) + sum(_ways(name, pattern) for pattern in expressions))
    if work > MAX_WORK:
        raise AdapterUnsupported(
            f"the patterns of {name!r} may take too long to match {num_paths} modules: write the "
            f"modules' own names, without special characters"
        )


def _ways(name: str, pattern: str) -> int:
    """In how many ways the expression can be tried at one place, at most."""
    plain = _behind_any_path(pattern).replace("(?:", "(")
    repeats = len(_REPEAT.findall(plain))
    choices = _choices(plain)
    refused = plain.count("(") > MAX_GROUPS or repeats > 1
    if refused or choices is None or _REPEATED_GROUP.search(plain) or _BEYOND.search(pattern):
        raise _too_slow(name, pattern)
    ways = choices * (_REPEAT_WAYS if repeats else 1)
    if ways > MAX_WAYS:
        raise _too_slow(name, pattern)
    return ways


def _behind_any_path(pattern: str) -> str:
    """The pattern without a leading ``.*``, which says no more than that it may match an end."""
    return pattern[2:] if _LEADING.match(pattern) and "|" not in pattern else pattern


def _choices(pattern: str) -> int | None:
    """Ways through its alternatives and optional parts, None if its groups are not closed.

    What stands side by side multiplies, alternatives add up, a question mark doubles.
    """
    totals, products = [0], [1]
    for character in pattern:
        if character == "(":
            totals.append(0)
            products.append(1)
        elif character == "|":
            totals[-1] += products[-1]
            products[-1] = 1
        elif character == "?":
            products[-1] *= 2
        elif character == ")":
            inside = totals.pop() + products.pop()
            if not products:
                return None
            products[-1] *= inside
    return totals[0] + products[0] if len(products) == 1 else None


def _too_slow(name: str, pattern: str) -> AdapterUnsupported:
    return AdapterUnsupported(
        f"{name!r} holds the pattern {shown(pattern)}, which may take too long to match: write "
        f"module names or paths, or an expression with at most one repeat behind a leading '.*', "
        f"{MAX_GROUPS} groups, no repeated group and few alternatives"
    )


def _compile(name: str, pattern: str) -> re.Pattern[str]:
    # With both, the engine would look for two places at once where the module's path may be split.
    before = r"(.*\.)?" if _behind_any_path(pattern) == pattern else ""
    try:
        return re.compile(rf"{before}({pattern})$")
    except (re.error, OverflowError) as error:
        raise AdapterCorrupt(f"{name!r} holds the bad pattern {shown(pattern)}: {error}") from error
