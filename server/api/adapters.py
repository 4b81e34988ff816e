"""Adapter management: ``/v1/adapters``, and vLLM's load and unload with its exact answers."""

import dataclasses
from typing import Annotated, BinaryIO, TypeVar

import msgspec
from fastapi import APIRouter, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.responses import PlainTextResponse, Response

from ..store.entries import Adapter
from ..store.errors import AlreadyLoaded, UnknownAdapter
from ..store.sources import parse_source
from ..store.wanted import Wanted
from ..tenants.tenant import Caller
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
from .caller import Calling
from .errors import InvalidRequest, InvalidUserInput, ManagementForbidden, NotFound
from .security import is_upload, json_only, local_if_open, require_json
from .state import AppState, State

router = APIRouter(dependencies=[local_if_open])

_Fields = TypeVar("_Fields", bound=Body)


@router.get("/v1/adapters")
async def list_adapters(
    state: State,
    caller: Calling,
    limit: Annotated[int, Query(ge=1, le=100_000)] = 1000,
    after: str = "",
) -> Response:
    """Adapters by name, at most ``limit`` of them and only those behind the name ``after``."""
    cards = Cards.now(state, caller)
    visible = state.registry.catalog.visible(caller)
    behind = [each for each in visible if cards.name(each) > after]
    data = [cards.card(each) for each in behind[:limit]]
    return _json({"object": "list", "data": data, "has_more": len(behind) > limit})


@router.post("/v1/adapters", openapi_extra={"requestBody": NEW_ADAPTER})
async def add_adapter(request: Request, state: State, caller: Calling) -> Response:
    """Register an adapter, from a source named in JSON or from an archive in a form."""
    if is_upload(request):
        return await _add_upload(request, state, caller)
    require_json(request)
    body = _parsed(AdapterBody, await _json_of(request))
    _require_allowed(body.place, state, caller)
    wanted = Wanted(body.name, body.place, body.replace, body.digest)
    if body.wait:
        return _card(await state.registry.add(wanted), state, caller, 201)
    return _card(await state.registry.promise(wanted), state, caller, 202)


@router.get("/v1/adapters/{name:path}")
async def get_adapter(name: str, state: State, caller: Calling) -> Response:
    """One adapter."""
    return _card(state.registry.catalog.look_up(name, caller), state, caller)


@router.delete("/v1/adapters/{name:path}")
async def delete_adapter(name: str, state: State, caller: Calling) -> dict[str, object]:
    """Stop serving an adapter and forget its versions; requests that run on it finish."""
    await state.registry.remove(_changeable(name, caller, state).name)
    return {"name": name, "object": "adapter", "deleted": True}


@router.patch("/v1/adapters/{name:path}", dependencies=[json_only])
async def change_adapter(
    name: str, body: ChangeAdapterBody, state: State, caller: Calling
) -> Response:
    """Make another version the default, go back to the one before, pin or unpin."""
    adapter = _changeable(name, caller, state)
    if body.pinned is not None and not caller.is_admin:
        raise ManagementForbidden("Pinning takes memory from others: it needs an admin key.")
    if body.rollback or body.version is not None:
        adapter = await state.registry.set_default(adapter.name, body.version)
    if body.pinned is not None:
        room = state.require_info().pin_room
        adapter = await state.registry.set_pinned(adapter.name, body.pinned, room)
    return _card(adapter, state, caller)


@router.post("/v1/load_lora_adapter", dependencies=[json_only])
async def load_lora_adapter(body: LoadLoraBody, state: State, caller: Calling) -> PlainTextResponse:
    """Load, or with ``load_inplace`` replace, an adapter of any kind."""
    name = body.lora_name
    if not name or not body.lora_path:
        raise InvalidUserInput("Both 'lora_name' and 'lora_path' must be provided.")
    _require_allowed(body.lora_path, state, caller)
    try:
        await state.registry.add(Wanted(name, body.lora_path, body.load_inplace))
    except AlreadyLoaded as error:
        raise InvalidUserInput(
            f"The lora adapter '{name}' has already been loaded. If you want to load the adapter "
            "in place, set 'load_inplace' to True."
        ) from error
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post("/v1/unload_lora_adapter", dependencies=[json_only])
async def unload_lora_adapter(
    body: UnloadLoraBody, state: State, caller: Calling
) -> PlainTextResponse:
    """Stop serving an adapter; requests that run on it finish."""
    if not body.lora_name:
        raise InvalidUserInput("'lora_name' needs to be provided to unload a LoRA adapter.")
    try:
        await state.registry.remove(_changeable(body.lora_name, caller, state).name)
    except UnknownAdapter as error:
        raise NotFound(f"The lora adapter '{body.lora_name}' cannot be found.") from error
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


async def _add_upload(request: Request, state: AppState, caller: Caller) -> Response:
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
        if caller.tenant is not None:
            own = caller.tenant
            wanted = dataclasses.replace(wanted, owner=own.name, limits=own.limits)
        file: BinaryIO = archive.file
        return _card(await state.registry.add_archive(wanted, file), state, caller, 201)


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
        located = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        raise RequestValidationError(located) from error


def _changeable(name: str, caller: Caller, state: AppState) -> Adapter:
    """The adapter that the caller calls so and may change.

    Raises:
        UnknownAdapter: There is none that it may see.
        ManagementForbidden: It is not its own.
    """
    adapter = state.registry.catalog.look_up(name, caller)
    if caller.tenant is not None and adapter.owner != caller.tenant.name:
        raise ManagementForbidden(f"The adapter {name!r} is not yours; this needs an admin key.")
    return adapter


def _require_allowed(source: str, state: AppState, caller: Caller) -> None:
    if not caller.is_admin:
        raise ManagementForbidden(
            "Loading from a source needs an admin key; upload the adapter as a form with 'archive'."
        )
    state.policy.require(parse_source(source))


def _card(adapter: Adapter, state: AppState, caller: Caller, status: int = 200) -> Response:
    return _json(Cards.now(state, caller).card(adapter), status)


def _json(content: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")
