"""``GET /v1/models``: the base and every adapter that is ready."""

from fastapi import APIRouter

from .registry import AdapterEntry, AdapterState
from .state import AppState, State

router = APIRouter()


@router.get("/v1/models")
async def list_models(state: State) -> dict[str, object]:
    """All models a request may name."""
    ready = [entry for entry in state.registry.entries() if entry.state is AdapterState.READY]
    return {"object": "list", "data": [_card(state, None), *(_card(state, e) for e in ready)]}


@router.get("/v1/models/{model:path}")
async def get_model(model: str, state: State) -> dict[str, object]:
    """One model, under any name a request may use for it."""
    return _card(state, state.registry.resolve(model))


def _card(state: AppState, entry: AdapterEntry | None) -> dict[str, object]:
    info = state.engine.info
    return {
        "id": state.model_name if entry is None else entry.name,
        "object": "model",
        "created": state.created if entry is None else entry.created,
        "owned_by": "deltamux",
        "root": state.model_root if entry is None else entry.path,
        "parent": None if entry is None else state.model_name,
        "max_model_len": None if info is None else info.max_model_len,
        "permission": [],
    }
