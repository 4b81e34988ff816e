"""Compacter (arXiv:2106.04647) as AdapterHub stores and computes it.

A bottleneck whose projections are sums of Kronecker products, with x a row:

    y = x H + b,   H = sum_i kron(rule_i, W_i)

with rule (n, n, n), or the product of (n, n, 1) and (n, 1, n); W (n, in / n, out / n), or the
product of (n, in / n, k) and (n, k, out / n). Rule and W are the module's own or shared by all of
them. Both projections are folded to dense matrices: at the width of a bottleneck, that is quick.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import AdapterCorrupt, AdapterUnsupported, shown
from ..formats.adapterhub import Config, Envelope, Method, MethodKind, ParsedMethod
from ..formats.adapterhub_bottleneck import Options, ProjectionPair, claims_site, parse_bottlenecks
from ..formats.adapterhub_invertible import claims_invertible, with_invertible
from ..formats.adapterhub_tensors import BOTTLENECKS, SHARED, Tensors, check_shape
from ..formats.config_fields import flag, positive_int
from ..formats.peft_tensors import required
from ..kind import KindPage

MAX_DIM = 256

PAGE = KindPage(
    title="Compacter and Compacter++ (arXiv:2106.04647)",
    family="addition",
    files="As bottleneck, with phm_layer true: adapter_down.0 and adapter_up hold W_left, W_right "
    "(or W) and b; phm_rule (or phm_rule_left, phm_rule_right) and a shared W are under "
    "shared_parameters",
    equation="As bottleneck, with D and U the transposes of sum_i kron(rule_i, W_left_i W_right_i)",
    primitives=("Bottleneck", "EmbeddingRows"),
    memory="As bottleneck: 2 * hidden * width + hidden + width a half",
    limits="As bottleneck; a bottleneck wider than the hidden size",
)


@dataclass(frozen=True, slots=True)
class _Product:
    """A tensor, or a batched product of two: (n, p, q) or (n, p, k) and (n, k, q)."""

    left: Tensor
    right: Tensor | None

    @property
    def shape(self) -> tuple[int, int, int]:
        n, p, q = self.left.shape
        return n, p, q if self.right is None else self.right.shape[2]

    def value(self) -> Tensor:
        left = self.left.float()
        return left if self.right is None else torch.bmm(left, self.right.float())


@dataclass(frozen=True, slots=True)
class _Hypercomplex:
    """x -> x sum_i kron(rule_i, w_i) + b."""

    rule: _Product
    w: _Product
    bias: Tensor | None

    @property
    def in_features(self) -> int:
        return self.rule.shape[1] * self.w.shape[1]

    @property
    def out_features(self) -> int:
        return self.rule.shape[2] * self.w.shape[2]

    def weight(self) -> Tensor:
        blocks = torch.einsum("iab,ipq->apbq", self.rule.value(), self.w.value())
        return blocks.reshape(self.in_features, self.out_features).T


@dataclass(frozen=True, slots=True)
class _Form:
    """What the projections are made of, by the configuration."""

    dim: int
    rank: int
    has_bias: bool
    factored_w: bool
    shared_w: bool
    factored_rule: bool
    shared_rule: bool

    @classmethod
    def read(cls, config: Mapping[str, object]) -> "_Form":
        def option(name: str, default: bool) -> bool:
            return flag(name, config.get(name, default))

        form = cls(
            dim=positive_int("phm_dim", config.get("phm_dim", 4)),
            rank=positive_int("phm_rank", config.get("phm_rank", 1)),
            has_bias=option("phm_bias", True),
            factored_w=option("factorized_phm_W", True),
            shared_w=option("shared_W_phm", False),
            factored_rule=option("factorized_phm_rule", False),
            shared_rule=option("shared_phm_rule", True),
        )
        if form.dim > MAX_DIM:
            raise AdapterUnsupported(f"phm_dim is {form.dim}, more than {MAX_DIM}")
        return form


@dataclass(frozen=True, slots=True)
class _Reader:
    """Makes projections from a module's tensors and the shared ones."""

    form: _Form
    shared_path: str
    shared: Mapping[str, Tensor]

    @property
    def shared_names(self) -> frozenset[str]:
        """Every shared tensor that there must be."""
        names = set(self._rule_names() if self.form.shared_rule else ())
        for side in ("down", "up") if self.form.shared_w else ():
            names |= set(self._w_names(side))
        return frozenset(names)

    def __call__(self, path: str, tensors: Mapping[str, Tensor]) -> ProjectionPair:
        used: set[str] = set()

        def own(name: str) -> Tensor:
            used.add(name)
            return required(path, tensors, name)[0]

        down = self._projection(path, "down", "adapter_down.0", own)
        up = self._projection(path, "up", "adapter_up", own)
        if down.out_features > down.in_features:
            raise AdapterUnsupported(f"{shown(path)} is wider than the hidden size")
        return ProjectionPair(down, up, frozenset(used))

    def _projection(
        self, path: str, side: str, module: str, own: Callable[[str], Tensor]
    ) -> _Hypercomplex:
        form, dim = self.form, self.form.dim
        rule_names, w_names = self._rule_names(), self._w_names(side)
        rule = _product(
            path,
            [self._shared(n) if form.shared_rule else own(f"{module}.{n}") for n in rule_names],
            dim,
            1,
        )
        w = _product(
            path,
            [self._shared(n) if form.shared_w else own(f"{module}.{n}") for n in w_names],
            dim,
            form.rank,
        )
        if rule.shape != (dim, dim, dim):
            raise AdapterCorrupt(f"{shown(path)} has a phm_rule of {list(rule.shape)}")
        bias = own(f"{module}.b") if form.has_bias else None
        found = _Hypercomplex(rule, w, bias)
        if bias is not None:
            check_shape(path, f"{module}.b", bias, found.out_features)
        return found

    def _shared(self, name: str) -> Tensor:
        return required(self.shared_path, self.shared, name)[0]

    def _rule_names(self) -> tuple[str, ...]:
        return ("phm_rule_left", "phm_rule_right") if self.form.factored_rule else ("phm_rule",)

    def _w_names(self, side: str) -> tuple[str, ...]:
        stem = f"W_{side}" if self.form.shared_w else "W"
        return (f"{stem}_left", f"{stem}_right") if self.form.factored_w else (stem,)


def _matches(config: Config) -> bool:
    return config.get("architecture") is None and config.get("phm_layer") not in (None, False)


def _claims(config: Config, container: str, path: str) -> bool:
    return (
        container == SHARED
        or claims_invertible(config, container)
        or claims_site(config, container, path)
    )


def _parse(config: Config, envelope: Envelope, tensors: Tensors) -> ParsedMethod:
    flag("phm_layer", config["phm_layer"])
    options = Options.read(config)
    reader = _Reader(_Form.read(config), *_shared_module(envelope, tensors))
    for name in sorted(reader.shared.keys() - reader.shared_names):
        raise AdapterUnsupported(
            f"the shared tensor {shown(name)} is not served: the configuration has none"
        )
    parsed = parse_bottlenecks(options, tensors.get(BOTTLENECKS, {}), reader)
    return with_invertible(parsed, config, envelope, tensors)


KIND = MethodKind("compacter", PAGE, Method(_matches, _claims, _parse))


def _shared_module(envelope: Envelope, tensors: Tensors) -> tuple[str, Mapping[str, Tensor]]:
    modules = tensors.get(SHARED, {})
    for path in modules:
        if path != envelope.stem:
            raise AdapterUnsupported(f"shared parameters of {shown(path)} are not served")
    return envelope.stem, modules.get(envelope.stem, {})


def _product(path: str, tensors: list[Tensor], dim: int, rank: int) -> _Product:
    shapes = [list(tensor.shape) for tensor in tensors]
    sane = all(len(shape) == 3 and shape[0] == dim and 0 not in shape for shape in shapes)
    if not sane or (len(shapes) == 2 and not shapes[0][2] == shapes[1][1] == rank):
        raise AdapterCorrupt(
            f"{shown(path)} has factors of {shapes}, and phm_dim is {dim}, the rank {rank}"
        )
    return _Product(tensors[0], tensors[1] if len(tensors) == 2 else None)
