"""What AdapterHub's ``LoRAConfig`` says, whichever of its methods it is: LoRA, DoRA, VeRA or IA3.

Every module that it adapts is named by the tensors. GPT-2's fused query, key and value
(``LoRAMergedLinear``) has one block for each of the matrices in ``attn_matrices``, in the order q,
k, v, and the other thirds of its output are left alone.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import AdapterCorrupt, AdapterUnsupported, shown
from ..layout import BaseLayout, LinearTarget
from .adapterhub import NOT_CAUSAL, Envelope
from .adapterhub_tensors import Modules, check_layers, layer_number, read_layers
from .config_fields import FieldRules, finite_number, flag, positive_int

MAX_RANK = 4096

_FUSED = "c_attn"
_MATRICES = ("q", "k", "v")

RULES = FieldRules(
    implemented=frozenset(
        {
            "architecture",
            "selfattn_lora",
            "intermediate_lora",
            "output_lora",
            "leave_out",
            "r",
            "alpha",
            "attn_matrices",
            "composition_mode",
            "use_dora",
            "vera_d",
            "vera_b",
        }
    ),
    harmless={
        "dropout": "off outside training",
        "init_weights": "initialization only",
        "init_weights_seed": "initialization only",
        "dtype": "of the tensors, which say it themselves",
    },
    refused={
        "use_gating": NOT_CAUSAL,
    },
)


@dataclass(frozen=True, slots=True)
class LoraScalars:
    """The numbers of a ``LoRAConfig``.

    Attributes:
        rank: r.
        alpha: alpha, or r where the library's loader says so.
        matrices: Which of q, k and v are adapted, in this order.
        modules_per_layer: Modules that a layer must have tensors for.
        left_out: Layers without any.
    """

    rank: int
    alpha: float
    matrices: tuple[str, ...]
    modules_per_layer: int
    left_out: frozenset[int]

    @classmethod
    def read(
        cls, config: Mapping[str, object], envelope: Envelope, rules: FieldRules = RULES
    ) -> "LoraScalars":
        """Check every field, and read those that all methods have.

        Raises:
            AdapterUnsupported: It is not served.
            AdapterCorrupt: It is not what the library writes.
        """
        rules.check(config)
        rank = positive_int("r", config.get("r", 8))
        if rank > MAX_RANK:
            raise AdapterUnsupported(f"the config field 'r' is {rank}, more than {MAX_RANK}")
        alpha = finite_number("alpha", config.get("alpha", 8))
        matrices = _matrices(config.get("attn_matrices", ["q", "v"]))
        attention = flag("selfattn_lora", config.get("selfattn_lora", True))
        fused = envelope.model_type == "gpt2"
        others = [
            flag(name, config.get(name, False)) for name in ("intermediate_lora", "output_lora")
        ]
        return cls(
            rank=rank,
            alpha=float(rank) if envelope.alpha_is_rank else alpha,
            matrices=matrices,
            modules_per_layer=attention * (min(1, len(matrices)) if fused else len(matrices))
            + sum(others),
            left_out=read_layers("leave_out", config.get("leave_out", [])),
        )

    @property
    def scale(self) -> float:
        """LoRA's s."""
        return self.alpha / self.rank

    def check_modules(self, modules: Modules) -> None:
        """Raise AdapterCorrupt unless every layer has as many modules as the configuration says."""
        if not modules:
            raise AdapterCorrupt("the weight file adapts no module at all")
        counts: dict[int, int] = {}
        for path in modules:
            number = layer_number(path)
            counts[number] = counts.get(number, 0) + 1
        for number, count in counts.items():
            if number in self.left_out or count != self.modules_per_layer:
                raise AdapterCorrupt(
                    f"the configuration adapts {self.modules_per_layer} modules of a layer and "
                    f"leaves out {shown(sorted(self.left_out), 80)}; layer {number} has tensors "
                    f"for {count}"
                )

    def check_layers(self, layout: BaseLayout, paths: Iterable[str]) -> None:
        """Raise AdapterMismatch unless the base has the same number of layers."""
        check_layers(layout, {layer_number(path) for path in paths}, self.left_out)

    def blocks(self, path: str) -> int:
        """Blocks of a module's factors, 1 but for a fused module."""
        return len(self.matrices) if is_fused(path) else 1


def is_fused(path: str) -> bool:
    """Whether the module computes query, key and value in one."""
    return path.rpartition(".")[2] == _FUSED


def columns(target: LinearTarget, matrices: Iterable[str]) -> list[int]:
    """Where the thirds of q, k or v begin in the output of a fused module."""
    third = target.out_features // len(_MATRICES)
    return [_MATRICES.index(matrix) * third for matrix in matrices]


def is_lora(config: Mapping[str, object]) -> bool:
    """Whether the configuration is of this family."""
    return config.get("architecture") == "lora"


def is_vera(config: Mapping[str, object]) -> bool:
    """Whether the library makes it VeRA: by the type of either number."""
    return is_added(config) and any(
        isinstance(config.get(name), float) for name in ("vera_d", "vera_b")
    )


def is_added(config: Mapping[str, object]) -> bool:
    """Whether something is added to a module's output, rather than multiplied with it."""
    return config.get("composition_mode", "add") == "add"


def is_dora(config: Mapping[str, object]) -> bool:
    """Whether the configuration asks for a magnitude of its own, or AdapterCorrupt."""
    return flag("use_dora", config.get("use_dora", False))


def _matrices(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise AdapterCorrupt(f"the config field 'attn_matrices' is {shown(value)}, not a list")
    # The library looks for q, k and v in it and nothing else.
    return tuple(matrix for matrix in _MATRICES if matrix in value)
