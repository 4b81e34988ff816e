"""The base's tokens as grammars are matched against them, and what a grammar may cost."""

from dataclasses import dataclass
from typing import Self

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import Tokenizer as Backend

from ..text.tokenizer_source import TokenizerSource
from .constraint import GrammarRefused

_LIMITS = LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    step_max_items=25_000,
    max_lexer_states=20_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
"""Of one grammar: 10 ms for one mask and mostly far less, and 40 MB while it is matched."""

_NO_END = "<|no end|>"


class Vocabulary:
    """The tokens of a tokenizer, laid out for matching.

    Attributes:
        end_token_ids: Tokens that end a text, at least one; it may be one the model does not have.
    """

    def __init__(self, tokenizer: LLTokenizer, end_token_ids: tuple[int, ...]) -> None:
        """Use ``VocabularySource.load``."""
        self._tokenizer = tokenizer
        self.end_token_ids = end_token_ids

    def compile(self, grammar: str) -> LLMatcher:
        """A matcher at the beginning of its text; other threads go on meanwhile.

        Raises:
            GrammarRefused: It is no grammar, has features that are not enforced, or costs too much.
        """
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise GrammarRefused(first_line(matcher.get_error()))
        return matcher


@dataclass(frozen=True, slots=True)
class VocabularySource:
    """What a vocabulary is made from; it can be sent to another process.

    Attributes:
        serialized: A tokenizer.json.
        end_token_ids: The model's own.
        num_tokens: Of the model.
    """

    serialized: str
    end_token_ids: tuple[int, ...]
    num_tokens: int

    @classmethod
    def of(cls, tokenizer: TokenizerSource, num_tokens: int) -> Self:
        """The tokens of ``tokenizer``, for a model of ``num_tokens``."""
        return cls(tokenizer.serialized, tokenizer.end_token_ids, num_tokens)

    def load(self) -> Vocabulary:
        """Lay the tokens out; of 50,000 that takes 0.3 s in which no other thread goes on."""
        backend = Backend.from_str(self.serialized)
        ends = [end for end in self.end_token_ids if end < self.num_tokens]
        if not ends:
            # Matching needs one; this is none of the model's and is never chosen.
            backend.add_special_tokens([_NO_END])
            ends = [backend.get_vocab()[_NO_END]]
        size = max(self.num_tokens, *(each + 1 for each in backend.get_vocab().values()))
        return Vocabulary(LLTokenizer(backend.to_str(), n_vocab=size, eos_token=ends), tuple(ends))


def first_line(message: str) -> str:
    """What went wrong, without the parser's state and the grammar's text behind it."""
    head = message.partition("\n<state>")[0]
    return " ".join(head.split())
