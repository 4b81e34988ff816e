"""Activation functions by the names that libraries write into configurations."""

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.nn import functional

from ...kernels.bottleneck.op import Activation
from ..errors import AdapterUnsupported, shown

_NAMES: Mapping[str, Activation] = {
    "linear": Activation.LINEAR,
    "relu": Activation.RELU,
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_python": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "gelu_python_tanh": Activation.GELU_TANH,
    "gelu_fast": Activation.GELU_TANH,
    "gelu_accurate": Activation.GELU_TANH,
    "quick_gelu": Activation.GELU_QUICK,
    "tanh": Activation.TANH,
    "sigmoid": Activation.SIGMOID,
    "leakyrelu": Activation.LEAKY_RELU,
    "leaky_relu": Activation.LEAKY_RELU,
    "relu6": Activation.RELU6,
    "relu2": Activation.RELU_SQUARED,
}

_FUNCTIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    Activation.LINEAR: lambda x: x,
    Activation.RELU: Tensor.relu,
    Activation.SILU: functional.silu,
    Activation.GELU: functional.gelu,
    Activation.GELU_TANH: lambda x: functional.gelu(x, approximate="tanh"),
    Activation.TANH: Tensor.tanh,
    Activation.SIGMOID: Tensor.sigmoid,
    Activation.LEAKY_RELU: functional.leaky_relu,
    Activation.GELU_QUICK: lambda x: x * (1.702 * x).sigmoid(),
    Activation.RELU6: functional.relu6,
    Activation.RELU_SQUARED: lambda x: x.relu().square(),
}


def read_activation(name: str, value: object) -> Activation:
    """The activation that a configuration's field of this name means.

    Raises:
        AdapterUnsupported: It is none of those that are served.
    """
    known = _NAMES.get(value.lower()) if isinstance(value, str) else None
    if known is None:
        raise AdapterUnsupported(
            f"the config field {name!r} is {shown(value)}, which is not served; served are "
            f"{', '.join(_NAMES)}"
        )
    return known


def activate(activation: Activation, x: Tensor) -> Tensor:
    """f(x), element by element."""
    return _FUNCTIONS[activation](x)
