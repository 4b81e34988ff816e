"""``GET /v1/usage``: what tenants used, as JSON or as a table for a spreadsheet."""

import csv
import io
from collections.abc import Sequence
from datetime import date
from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field, field_validator
from starlette.responses import Response

from ..tenants.tenant import Caller
from ..usage.counts import NOTHING, Counts
from ..usage.records import COUNTS, DIMENSIONS, UsageQuery, UsageRow
from .caller import Calling
from .errors import InvalidRequest, ManagementForbidden
from .respond import json_response
from .state import State

router = APIRouter()

_CSV = "text/csv"


class UsageAsked(BaseModel):
    """The query's fields."""

    model_config = ConfigDict(extra="forbid")

    start: date = date.min
    end: date = date.max
    group_by: str = ",".join(DIMENSIONS)
    tenant: str | None = None
    key_id: str | None = None
    adapter: str | None = None
    digest: str | None = Field(default=None, max_length=512)
    format: Literal["json", "csv"] | None = None

    @field_validator("group_by")
    @classmethod
    def _known(cls, value: str) -> str:
        names = _names(value)
        wrong = [name for name in names if name not in DIMENSIONS]
        if wrong or len(set(names)) < len(names):
            raise ValueError(f"name each of these at most once: {', '.join(DIMENSIONS)}")
        return value


class UsageAnswer(msgspec.Struct, frozen=True):
    """Sums by group, and of all of them."""

    data: list[dict[str, str | int]]
    total: dict[str, int]
    object: str = "usage"


@router.get("/v1/usage")
async def usage(
    request: Request, state: State, caller: Calling, asked: Annotated[UsageAsked, Query()]
) -> Response:
    """Tokens by tenant, key, adapter version and day: a tenant's own, or with an admin key all."""
    query = _query(asked, caller)
    rows = await state.ledger.find(query)
    if asked.format == "csv" or (asked.format is None and _wants_csv(request)):
        return Response(_table(query.group_by, rows), media_type=_CSV)
    data = [_line(query.group_by, row) for row in rows]
    total = sum((row.counts for row in rows), NOTHING)
    return json_response(UsageAnswer(data, _amounts(total)))


def _query(asked: UsageAsked, caller: Caller) -> UsageQuery:
    if asked.end < asked.start:
        raise InvalidRequest("'end' is before 'start'.", "end")
    own = caller.tenant.name if caller.tenant else None
    if own is not None and asked.tenant not in (None, own):
        raise ManagementForbidden("The usage of another tenant takes an admin key.", "tenant")
    return UsageQuery(
        asked.start,
        asked.end,
        tuple(_names(asked.group_by)),
        asked.tenant if own is None else own,
        asked.key_id,
        asked.adapter,
        None if asked.digest is None else asked.digest.removeprefix("sha256:"),
    )


def _names(group_by: str) -> list[str]:
    return [name for name in group_by.split(",") if name]


def _wants_csv(request: Request) -> bool:
    return _CSV in request.headers.get("accept", "")


def _line(names: Sequence[str], row: UsageRow) -> dict[str, str | int]:
    return {**dict(zip(names, row.group, strict=True)), **_amounts(row.counts)}


def _amounts(counts: Counts) -> dict[str, int]:
    amounts = {name: getattr(counts, name) for name in COUNTS}
    return {**amounts, "total_tokens": counts.prompt_tokens + counts.completion_tokens}


def _table(names: Sequence[str], rows: Sequence[UsageRow]) -> str:
    text = io.StringIO()
    columns = [*names, *_amounts(NOTHING)]
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(_line(names, row) for row in rows)
    return text.getvalue()
