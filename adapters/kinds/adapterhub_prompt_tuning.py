"""Prompt tuning (arXiv:2104.08691) of AdapterHub: refused, because nothing can compute it.

The library takes it for encoders only. For Llama and GPT-2 it rejects the configuration; through an
interface of one's own it adds and saves the prompt, and then its forward pass fails. So no decoder
was ever trained or run with it, and there is no answer to be faithful to.
"""

from ..errors import AdapterUnsupported
from ..formats.adapterhub import Config, Envelope, Method, MethodKind, ParsedMethod, claims_all
from ..formats.adapterhub_tensors import PROMPTS, Tensors
from ..kind import KindPage

PAGE = KindPage(
    title="Prompt tuning (arXiv:2104.08691)",
    family="addition",
    files="adapter_config.json with architecture prompt_tuning",
    equation="none: the library itself has no decoder that computes it",
    primitives=(),
    memory="none",
    limits="refused: AdapterHub rejects prompt tuning for decoders; PEFT's is served",
)


def _matches(config: Config) -> bool:
    return config.get("architecture") == "prompt_tuning"


def _parse(_config: Config, _envelope: Envelope, _tensors: Tensors) -> ParsedMethod:
    raise AdapterUnsupported(
        "architecture 'prompt_tuning' is not served: AdapterHub itself rejects it for decoders, or "
        "fails in the forward pass; train the prompt with PEFT"
    )


KIND = MethodKind("prompt_tuning", PAGE, Method(_matches, claims_all(PROMPTS), _parse))
