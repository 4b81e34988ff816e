"""``GET /v1/models``: the base, every adapter that has a version, and a tenant's aliases."""

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from ..store.entries import Adapter
from ..store.errors import UnknownModel
from ..tenants.tenant import Caller
from .caller import Calling
from .state import AppState, State

router = APIRouter()


@router.get("/v1/models")
async def list_models(state: State, caller: Calling) -> Response:
    """All models a request may name."""
    served = [each for each in state.registry.catalog.visible(caller) if each.default is not None]
    adapters = [_adapter_card(state, each, caller) for each in served]
    aliases = [_card(state, name, name) for name in _aliases(state, caller)]
    # Encoded here: there may be ten thousand, and the framework would look at each field.
    content = msgspec.json.encode(
        {"object": "list", "data": [_base_card(state, caller), *adapters, *aliases]}
    )
    return Response(content, media_type="application/json")


@router.get("/v1/models/{model:path}")
async def get_model(model: str, state: State, caller: Calling) -> dict[str, object]:
    """One model, under any name a request may use for it."""
    catalog = state.registry.catalog
    chosen = catalog.resolve(model, caller)
    if catalog.is_base(model, caller):
        return _base_card(state, caller)
    name = model.removeprefix(f"{catalog.base_name}:")
    if caller.tenant is not None and name in caller.tenant.aliases:
        return _card(state, name, name)
    if chosen is None:
        return _base_card(state, caller)
    return _adapter_card(state, chosen.adapter, caller)


def _aliases(state: AppState, caller: Caller) -> list[str]:
    """The caller's aliases that stand for something, other than names it has adapters under."""
    if caller.tenant is None:
        return []
    return [name for name in sorted(caller.tenant.aliases) if _is_served(name, state, caller)]


def _is_served(model: str, state: AppState, caller: Caller) -> bool:
    try:
        state.registry.catalog.resolve(model, caller)
    except UnknownModel:
        return False
    return True


def _base_card(state: AppState, caller: Caller) -> dict[str, object]:
    # Where files lie on the server is no tenant's business.
    root = state.model_root if caller.tenant is None else state.model_name
    return _card(state, state.model_name, root) | {"parent": None}


def _adapter_card(state: AppState, adapter: Adapter, caller: Caller) -> dict[str, object]:
    if caller.tenant is None:
        return _card(state, adapter.name, adapter.source, adapter.created)
    return _card(state, adapter.plain_name, adapter.plain_name, adapter.created)


def _card(state: AppState, name: str, root: str, created: int | None = None) -> dict[str, object]:
    info = state.engine.info
    return {
        "id": name,
        "object": "model",
        "created": state.created if created is None else created,
        "owned_by": "deltamux",
        "root": root,
        "parent": state.model_name,
        "max_model_len": None if info is None else info.max_model_len,
        "permission": [],
    }
