"""Management of tenants: ``/v1/tenants`` and their keys, for administrators."""

from typing import Annotated

from fastapi import APIRouter
from pydantic import Field

from ..tenants.cards import card_of, key_card
from ..tenants.directory import Account
from ..tenants.settings import Form, NewTenant, TenantChange
from .security import admin_only, json_only, local_if_open
from .state import AppState, State

router = APIRouter(dependencies=[admin_only, local_if_open])


class NewKeyBody(Form):
    """``POST /v1/tenants/{name}/keys``.

    Attributes:
        overlap_seconds: For how long earlier keys stay good; without it they do for good.
    """

    overlap_seconds: Annotated[float, Field(ge=0, le=366 * 86_400)] | None = None


@router.get("/v1/tenants")
async def list_tenants(state: State) -> dict[str, object]:
    """All tenants and administrators, by name."""
    return {"object": "list", "data": [_card(each, state) for each in state.tenants.all()]}


@router.post("/v1/tenants", status_code=201, dependencies=[json_only])
async def create_tenant(body: NewTenant, state: State) -> dict[str, object]:
    """Make a tenant or an administrator; ``key`` is its key, told this once."""
    account, key = await state.tenant_admin.create(body)
    return {**_card(account, state), "key": key}


@router.get("/v1/tenants/{name}")
async def get_tenant(name: str, state: State) -> dict[str, object]:
    """One tenant or administrator."""
    return _card(state.tenant_admin.get(name), state)


@router.patch("/v1/tenants/{name}", dependencies=[json_only])
async def change_tenant(name: str, body: TenantChange, state: State) -> dict[str, object]:
    """Change what a tenant may use and how much, disable it or enable it, from now on."""
    return _card(await state.tenant_admin.change(name, body), state)


@router.delete("/v1/tenants/{name}")
async def delete_tenant(name: str, state: State) -> dict[str, object]:
    """Forget a tenant, refuse its keys at once and remove its own adapters."""
    await state.tenant_admin.delete(name)
    # Whoever gets the name later is somebody else.
    for adapter in state.registry.catalog.owned(name):
        await state.registry.remove(adapter.name)
    return {"name": name, "object": "tenant", "deleted": True}


@router.post("/v1/tenants/{name}/keys", status_code=201, dependencies=[json_only])
async def add_key(name: str, body: NewKeyBody, state: State) -> dict[str, object]:
    """Make another key, told this once; with ``overlap_seconds`` the earlier ones end."""
    key, secret = await state.tenant_admin.add_key(name, body.overlap_seconds)
    return {**key_card(key), "key": secret}


@router.delete("/v1/tenants/{name}/keys/{key_id}")
async def delete_key(name: str, key_id: str, state: State) -> dict[str, object]:
    """Refuse a key from now on."""
    await state.tenant_admin.delete_key(name, key_id)
    return {"id": key_id, "object": "tenant.key", "deleted": True}


def _card(account: Account, state: AppState) -> dict[str, object]:
    return card_of(account, state.tenants.is_in_file(account.name))
