"""Bottleneck adapters (arXiv:1902.00751) as AdapterHub stores and computes them.

    u = s (U f(D z + d) + e)

beside the attention, the MLP or both, with D (width, hidden) ``adapter_down.0.weight``, d its
bias, U (hidden, width) ``adapter_up.weight``, e its bias, and s ``scaling``: a number of the
configuration or a trained tensor. See ``adapterhub_bottleneck`` for z and the residual. An
invertible adapter (MAD-X, arXiv:2005.00052) changes the token embedding besides; see
``adapterhub_invertible``.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..errors import AdapterCorrupt, shown
from ..formats.adapterhub import Config, Envelope, Method, MethodKind, ParsedMethod
from ..formats.adapterhub_bottleneck import Options, ProjectionPair, claims_site, parse_bottlenecks
from ..formats.adapterhub_invertible import claims_invertible, with_invertible
from ..formats.adapterhub_tensors import BOTTLENECKS, Tensors
from ..formats.peft_tensors import required
from ..kind import KindPage

_DOWN, _UP = "adapter_down.0", "adapter_up"

PAGE = KindPage(
    title="Bottleneck adapters: Houlsby (arXiv:1902.00751), Pfeiffer (arXiv:2005.00247), parallel "
    "and scaled parallel (arXiv:2110.04366), AdapterPlus (arXiv:2406.06820)",
    family="addition",
    files="adapter_config.json with architecture null; per layer attention_adapters and "
    "output_adapters: adapter_down.0.weight and .bias, adapter_up.weight and .bias, scaling where "
    "it is trained; invertible_adapters F and G where inv_adapter is nice",
    equation="out = h + c r + s (U f(D z + d) + e); z = h, h + r or r; c = 1 in every ready-made "
    "configuration",
    primitives=("Bottleneck", "EmbeddingRows"),
    memory="2 * hidden * width + hidden + width a half that has one; hidden^2 once where c is not "
    "1; the whole token embedding where inv_adapter is nice",
    limits="ln_before and ln_after (a norm inside the bottleneck); use_gating (its gate is a mean "
    "over the whole sequence); residual_before_ln 'post_add' (the library fails); inv_adapter glow "
    "(the library fails), and nice on GPT-2 (it reads the sum of token and position) and Qwen (the "
    "inverse stands before the head); AdapterFusion",
)


@dataclass(frozen=True, slots=True)
class _Linear:
    """``nn.Linear``, as stored: (out, in) and (out,)."""

    stored: Tensor
    bias: Tensor

    @property
    def in_features(self) -> int:
        return self.stored.shape[1]

    @property
    def out_features(self) -> int:
        return self.stored.shape[0]

    def weight(self) -> Tensor:
        return self.stored.float()


def _matches(config: Config) -> bool:
    return config.get("architecture") is None and config.get("phm_layer") in (None, False)


def _claims(config: Config, container: str, path: str) -> bool:
    return claims_invertible(config, container) or claims_site(config, container, path)


def _parse(config: Config, envelope: Envelope, tensors: Tensors) -> ParsedMethod:
    options = Options.read(config)
    parsed = parse_bottlenecks(options, tensors.get(BOTTLENECKS, {}), _projections)
    return with_invertible(parsed, config, envelope, tensors)


KIND = MethodKind("bottleneck", PAGE, Method(_matches, _claims, _parse))


def _projections(path: str, tensors: Mapping[str, Tensor]) -> ProjectionPair:
    names = [f"{side}.{part}" for side in (_DOWN, _UP) for part in ("weight", "bias")]
    down, down_bias, up, up_bias = required(path, tensors, *names)
    for weight, bias in ((down, down_bias), (up, up_bias)):
        if weight.dim() != 2 or 0 in weight.shape or bias.shape != weight.shape[:1]:
            raise AdapterCorrupt(
                f"{shown(path)} has a projection of {list(weight.shape)} with a bias of "
                f"{list(bias.shape)}"
            )
    return ProjectionPair(_Linear(down, down_bias), _Linear(up, up_bias), frozenset(names))
