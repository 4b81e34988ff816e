"""``GET /v1/models``: the base and every adapter that has a version."""

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from ..store.entries import Adapter
from .state import AppState, State

router = APIRouter()


@router.get("/v1/models")
async def list_models(state: State) -> Response:
    """All models a request may name."""
    served = [each for each in state.registry.catalog.all() if each.default is not None]
    data = [_card(state, None), *(_card(state, each) for each in served)]
    # Encoded here: there may be ten thousand, and the framework would look at each field.
    content = msgspec.json.encode({"object": "list", "data": data})
    return Response(content, media_type="application/json")


@router.get("/v1/models/{model:path}")
async def get_model(model: str, state: State) -> dict[str, object]:
    """One model, under any name a request may use for it."""
    chosen = state.registry.catalog.resolve(model)
    return _card(state, None if chosen is None else chosen.adapter)


def _card(state: AppState, adapter: Adapter | None) -> dict[str, object]:
    info = state.engine.info
    return {
        "id": state.model_name if adapter is None else adapter.name,
        "object": "model",
        "created": state.created if adapter is None else adapter.created,
        "owned_by": "deltamux",
        "root": state.model_root if adapter is None else adapter.source,
        "parent": None if adapter is None else state.model_name,
        "max_model_len": None if info is None else info.max_model_len,
        "permission": [],
    }
