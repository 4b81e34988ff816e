"""From names and shapes in an adapter's file to the places of a base, or why they do not fit."""

import torch
from torch import Tensor

from ..errors import AdapterMismatch, AdapterUnsupported, shown
from ..finite import all_finite
from ..layout import BaseLayout, EmbeddingSite, LayerSite, LinearTarget, NormSite


def linear_target(
    layout: BaseLayout, path: str, in_features: int, out_features: int
) -> LinearTarget:
    """The target at ``path``, which must have these widths.

    Raises:
        AdapterMismatch: There is none, or it has others.
    """
    target = named_target(layout, path)
    ours, theirs = (target.in_features, target.out_features), (in_features, out_features)
    if ours != theirs:
        raise mismatch(
            layout,
            f"{shown(path)} maps {theirs[0]} to {theirs[1]} there, {ours[0]} to {ours[1]} here",
        )
    return target


def named_target(layout: BaseLayout, path: str) -> LinearTarget:
    """The target at ``path``, or AdapterMismatch."""
    target = layout.targets.get(path)
    if target is None:
        raise mismatch(layout, f"{shown(path)} is not a linear module of it")
    return target


def norm_site(layout: BaseLayout, path: str, size: int) -> NormSite:
    """The norm at ``path``, which must have this width, or AdapterMismatch."""
    norm = layout.norms_by_path.get(path)
    if norm is None:
        raise mismatch(layout, f"{shown(path)} is not a norm of it")
    if norm.size != size:
        raise mismatch(layout, f"{shown(path)} has {size} features there, {norm.size} here")
    return norm


def embedding_site(layout: BaseLayout, path: str) -> EmbeddingSite:
    """The embedding at ``path``, or AdapterMismatch."""
    embedding = layout.embeddings_by_path.get(path)
    if embedding is None:
        raise mismatch(layout, f"{shown(path)} is not an embedding of it")
    return embedding


def layer_site(layout: BaseLayout, path: str) -> LayerSite:
    """The layer at ``path``, or AdapterMismatch."""
    layer = layout.layers_by_path.get(path)
    if layer is None:
        raise mismatch(layout, f"{shown(path)} is not a layer of it")
    return layer


def mismatch(layout: BaseLayout, why: str) -> AdapterMismatch:
    """The error that says why an adapter does not fit, and what base is served."""
    return AdapterMismatch(
        f"the adapter was made for another base: {why}. This base ({layout.model_type}) has "
        f"{layout.num_layers} layers and hidden size {layout.hidden_size}"
    )


def cast(path: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor, contiguous and in the base's dtype.

    Raises:
        AdapterUnsupported: It holds a number that is none in this dtype.
    """
    done = tensor.detach().to(dtype).contiguous()
    if not all_finite(done):
        raise AdapterUnsupported(
            f"{shown(path)} overflows in {dtype}: serve with --dtype bfloat16 or float32"
        )
    return done
