"""What PEFT's LoHa and LoKr share: rank and alpha of each module, and the scale alpha / r."""

from collections.abc import Mapping
from dataclasses import dataclass

from .config_fields import finite_number
from .linear_adapter import HARMLESS, bounded_rank
from .peft_patterns import Patterns

IMPLEMENTED = frozenset({"r", "alpha", "rank_pattern", "alpha_pattern", "modules_to_save"})
"""Fields that are read here or in ``peft_saved``."""

LYCORIS_HARMLESS: Mapping[str, str] = {
    **HARMLESS,
    "rank_dropout": "off outside training",
    "module_dropout": "off outside training",
    "use_effective_conv2d": "of convolutions, whose tensors are refused",
}
"""Fields of both that cannot change an answer, with the reason."""

CONVOLUTIONS = "it belongs to a convolution, and the bases served here have none"
"""Why their tensors with ``t`` in the name are refused."""


@dataclass(frozen=True, slots=True)
class LycorisScalars:
    """What the configuration says about each module.

    Attributes:
        r: Rank of modules that no pattern matches.
        alpha: Like r.
        rank_pattern: Ranks of others.
        alpha_pattern: Alphas of others.
    """

    r: int
    alpha: float
    rank_pattern: Patterns
    alpha_pattern: Patterns

    @classmethod
    def read(cls, config: Mapping[str, object], num_modules: int) -> "LycorisScalars":
        """The fields, with PEFT's defaults; AdapterCorrupt where one is no number."""
        return cls(
            r=bounded_rank("r", config.get("r", 8)),
            alpha=finite_number("alpha", config.get("alpha", 8)),
            rank_pattern=Patterns.read(config, "rank_pattern", num_modules),
            alpha_pattern=Patterns.read(config, "alpha_pattern", num_modules),
        )

    def rank(self, path: str) -> int:
        """r of the module."""
        pattern = self.rank_pattern.first_match(path)
        if pattern is None:
            return self.r
        return bounded_rank(f"rank_pattern[{pattern}]", self.rank_pattern.values[pattern])

    def scale(self, path: str) -> float:
        """alpha / r of the module."""
        pattern = self.alpha_pattern.first_match(path)
        alpha = self.alpha
        if pattern is not None:
            alpha = finite_number(f"alpha_pattern[{pattern}]", self.alpha_pattern.values[pattern])
        return alpha / self.rank(path)
