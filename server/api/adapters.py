"""Adapter management: ``/v1/adapters``, and vLLM's load and unload with its exact answers."""

from typing import Annotated, BinaryIO, TypeVar

import msgspec
from fastapi import APIRouter, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.responses import PlainTextResponse, Response

from ..store.entries import Adapter
from ..store.errors import AlreadyLoaded, UnknownAdapter
from ..store.registry import Wanted
from ..store.sources import parse_source
from .adapter_bodies import (
    NEW_ADAPTER,
    AdapterBody,
    AdapterFields,
    ChangeAdapterBody,
    LoadLoraBody,
    UnloadLoraBody,
)
from .adapter_cards import Cards
from .body import Body
from .errors import InvalidRequest, InvalidUserInput, NotFound
from .security import is_upload, json_only, loopback_only, require_json
from .state import AppState, State

router = APIRouter(dependencies=[loopback_only])

_Fields = TypeVar("_Fields", bound=Body)


@router.get("/v1/adapters")
async def list_adapters(
    state: State,
    limit: Annotated[int, Query(ge=1, le=100_000)] = 1000,
    after: str = "",
) -> Response:
    """Adapters by name, at most ``limit`` of them and only those behind the name ``after``."""
    behind = [each for each in state.registry.catalog.all() if each.name > after]
    cards = Cards.now(state)
    data = [cards.card(each) for each in behind[:limit]]
    return _json({"object": "list", "data": data, "has_more": len(behind) > limit})


@router.post("/v1/adapters", openapi_extra={"requestBody": NEW_ADAPTER})
async def add_adapter(request: Request, state: State) -> Response:
    """Register an adapter, from a source named in JSON or from an archive in a form."""
    if is_upload(request):
        return await _add_upload(request, state)
    require_json(request)
    body = _parsed(AdapterBody, await _json_of(request))
    _require_allowed(body.place, state)
    wanted = Wanted(body.name, body.place, body.replace, body.digest)
    if body.wait:
        return _card(await state.registry.add(wanted), state, 201)
    return _card(await state.registry.promise(wanted), state, 202)


@router.get("/v1/adapters/{name}")
async def get_adapter(name: str, state: State) -> Response:
    """One adapter."""
    return _card(state.registry.catalog.get(name), state)


@router.delete("/v1/adapters/{name}")
async def delete_adapter(name: str, state: State) -> dict[str, object]:
    """Stop serving an adapter and forget its versions; requests that run on it finish."""
    await state.registry.remove(name)
    return {"name": name, "object": "adapter", "deleted": True}


@router.patch("/v1/adapters/{name}", dependencies=[json_only])
async def change_adapter(name: str, body: ChangeAdapterBody, state: State) -> Response:
    """Make another version the default, go back to the one before, pin or unpin."""
    adapter = state.registry.catalog.get(name)
    if body.rollback or body.version is not None:
        adapter = await state.registry.set_default(name, body.version)
    if body.pinned is not None:
        room = state.require_info().adapter_room
        adapter = await state.registry.set_pinned(name, body.pinned, room.host_bytes)
    return _card(adapter, state)


@router.post("/v1/load_lora_adapter", dependencies=[json_only])
async def load_lora_adapter(body: LoadLoraBody, state: State) -> PlainTextResponse:
    """Load, or with ``load_inplace`` replace, an adapter of any kind."""
    name = body.lora_name
    if not name or not body.lora_path:
        raise InvalidUserInput("Both 'lora_name' and 'lora_path' must be provided.")
    _require_allowed(body.lora_path, state)
    try:
        await state.registry.add(Wanted(name, body.lora_path, body.load_inplace))
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
        await state.registry.remove(body.lora_name)
    except UnknownAdapter as error:
        raise NotFound(f"The lora adapter '{body.lora_name}' cannot be found.") from error
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


async def _add_upload(request: Request, state: AppState) -> Response:
    state.policy.require_upload()
    async with request.form(max_files=1, max_fields=8) as form:
        texts = {name: value for name, value in form.items() if isinstance(value, str)}
        fields = _parsed(AdapterFields, texts, strict=False)
        archive = form.get("archive")
        if not isinstance(archive, UploadFile):
            raise InvalidRequest(
                "Send the adapter's .tar, .tar.gz or .zip as the file 'archive'.", "archive"
            )
        wanted = Wanted(fields.name, replace=fields.replace, expected=fields.digest)
        file: BinaryIO = archive.file
        return _card(await state.registry.add_archive(wanted, file), state, 201)


async def _json_of(request: Request) -> object:
    """The body as the framework would read it, were it always JSON."""
    try:
        return await request.json()
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from error


def _parsed(kind: type[_Fields], content: object, strict: bool = True) -> _Fields:
    try:
        return kind.model_validate(content, strict=strict)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


def _require_allowed(source: str, state: AppState) -> None:
    state.policy.require(parse_source(source))


def _card(adapter: Adapter, state: AppState, status: int = 200) -> Response:
    return _json(Cards.now(state).card(adapter), status)


def _json(content: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")
