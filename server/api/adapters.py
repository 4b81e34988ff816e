"""Adapter management: ``/v1/adapters``, and vLLM's load and unload with its exact answers."""

from fastapi import APIRouter
from msgspec import to_builtins
from starlette.responses import PlainTextResponse

from .errors import InvalidUserInput, NotFound, NotServed
from .protocol import AdapterBody, LoadLoraBody, UnloadLoraBody
from .registry import AdapterEntry, AlreadyLoaded, UnknownAdapter
from .security import json_only, loopback_only
from .state import State

router = APIRouter(dependencies=[loopback_only])


@router.get("/v1/adapters")
async def list_adapters(state: State) -> dict[str, object]:
    """Every adapter, also those that are loading or were refused."""
    return {"object": "list", "data": [_card(entry) for entry in state.registry.entries()]}


@router.post("/v1/adapters", status_code=201, dependencies=[json_only])
async def add_adapter(body: AdapterBody, state: State) -> dict[str, object]:
    """Load a folder and serve it under a name that is free."""
    return _card(await state.registry.load(body.name, body.path))


@router.get("/v1/adapters/{name}")
async def get_adapter(name: str, state: State) -> dict[str, object]:
    """One adapter."""
    return _card(state.registry.get(name))


@router.delete("/v1/adapters/{name}")
async def delete_adapter(name: str, state: State) -> dict[str, object]:
    """Stop serving an adapter; requests that run on it finish."""
    await state.registry.unload(name)
    return {"name": name, "object": "adapter", "deleted": True}


@router.patch("/v1/adapters/{name}")
async def change_adapter(name: str, state: State) -> None:
    """Refused: pins and versions are not served yet."""
    state.registry.get(name)
    raise NotServed("Pins, default versions and roll-back of adapters are not served yet.")


@router.post("/v1/load_lora_adapter", dependencies=[json_only])
async def load_lora_adapter(body: LoadLoraBody, state: State) -> PlainTextResponse:
    """Load, or with ``load_inplace`` replace, an adapter of any kind."""
    name = body.lora_name
    if not name or not body.lora_path:
        raise InvalidUserInput("Both 'lora_name' and 'lora_path' must be provided.")
    try:
        await state.registry.load(name, body.lora_path, replace=body.load_inplace)
    except AlreadyLoaded as error:
        raise InvalidUserInput(
            f"The lora adapter '{name}' has already been loaded. If you want to load the adapter "
            "in place, set 'load_inplace' to True."
        ) from error
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post("/v1/unload_lora_adapter", dependencies=[json_only])
async def unload_lora_adapter(body: UnloadLoraBody, state: State) -> PlainTextResponse:
    """Stop serving an adapter; requests that run on it finish."""
    if not body.lora_name:
        raise InvalidUserInput("'lora_name' needs to be provided to unload a LoRA adapter.")
    try:
        await state.registry.unload(body.lora_name)
    except UnknownAdapter as error:
        raise NotFound(f"The lora adapter '{body.lora_name}' cannot be found.") from error
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _card(entry: AdapterEntry) -> dict[str, object]:
    return {
        "name": entry.name,
        "object": "adapter",
        "path": entry.path,
        "state": entry.state,
        "created": entry.created,
        "error": entry.error,
        "info": to_builtins(entry.info),
    }
