"""``deltamux tenants``: on the database of a stopped server, or through a running one.

A state folder belongs to one server at a time. Where none has it, the command does; where one runs,
the command asks that server with an admin key, so that a change is in force at once.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..config import default_state_dir
from .errors import TenantError

if TYPE_CHECKING:
    from .places import Tenants

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd])")


class _Duration(click.ParamType[float, object]):
    """Seconds, written like 30s, 15m, 24h or 7d."""

    name = "duration"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Parse the text; a number is taken as it is."""
        if isinstance(value, float):
            return value
        match = _DURATION.fullmatch(str(value))
        if match is None:
            self.fail(f"{value!r} is no duration; write it like 30s, 15m, 24h or 7d", param, ctx)
        return float(match[1]) * _UNITS[match[2]]


class _Alias(click.ParamType[tuple[str, dict[str, float]], object]):
    """NAME=ADAPTER, or several with weights as NAME=ADAPTER:90,OTHER:10."""

    name = "alias"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, dict[str, float]]:
        """Split at the first equals sign, then at commas, then at colons."""
        if isinstance(value, tuple):
            return value
        name, equals, targets = str(value).partition("=")
        try:
            parts = [each.partition(":") for each in targets.split(",")]
            weights = {target: float(weight or 1) for target, _, weight in parts}
        except ValueError:
            weights = {}
        if not (name and equals and weights):
            self.fail(f"{value!r} is not NAME=ADAPTER or NAME=ADAPTER:90,OTHER:10", param, ctx)
        return name, weights


class _Limit(click.ParamType[tuple[str, int], object]):
    """NAME=N."""

    name = "limit"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int]:
        """Split at the equals sign."""
        if isinstance(value, tuple):
            return value
        name, _, number = str(value).partition("=")
        if not (name and number.isascii() and number.isdigit()):
            self.fail(f"{value!r} is not NAME=N, as concurrency=16", param, ctx)
        return name, int(number)


@click.group()
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="DELTAMUX_STATE_DIR",
    default=default_state_dir,
    show_default="the user's state folder",
    help="The server's.",
)
@click.option(
    "--url",
    envvar="DELTAMUX_URL",
    help="Ask the server there.  [default: the one that has the state folder, if any]",
)
@click.option(
    "--admin-key",
    envvar="DELTAMUX_ADMIN_KEY",
    show_envvar=True,
    help="For a running server that has tenants. Others see what a command line says: prefer the "
    "environment.",
)
@click.pass_context
def tenants(ctx: click.Context, /, **place: Any) -> None:
    """Make, list and disable tenants and administrators, and change their keys."""
    ctx.obj = place


@tenants.command()
@click.argument("name")
@click.option(
    "--role",
    type=click.Choice(["user", "admin"]),
    default="user",
    show_default=True,
    help="admin: keys that manage the server and act for no tenant.",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="PATTERN",
    help="Name or glob of adapters it may see and use. Repeatable.",
)
@click.option("--default", help="Adapter or alias that the base's name means for it.")
@click.option(
    "--alias",
    "aliases",
    type=_Alias(),
    multiple=True,
    metavar="NAME=ADAPTER",
    help="A name of its own for an adapter, or for several with weights, as "
    "support=v7:90,v8:10. Repeatable.",
)
@click.option("--weight", type=float, help="Its share under token-fair scheduling.  [default: 1]")
@click.option(
    "--limit",
    "limits",
    type=_Limit(),
    multiple=True,
    metavar="NAME=N",
    help="As in the tenants file: requests_per_minute=600. Repeatable.",
)
@click.option(
    "--shares-cache/--own-cache",
    default=None,
    help="Whether it shares cached prefixes with others that do.  [default: own cache]",
)
@click.pass_obj
def create(place: Mapping[str, Any], /, name: str, role: str, **options: Any) -> None:
    """Make a tenant or an administrator, and show its key, this once."""
    given = {key: value for key, value in options.items() if value not in (None, ())}
    for repeated, form in (("adapters", list), ("aliases", dict), ("limits", dict)):
        if repeated in given:
            given[repeated] = form(given[repeated])
    with _tenants(place) as known:
        _show_key(known.create({"name": name, "role": role, **given})["key"])


@tenants.command(name="list")
@click.pass_obj
def list_tenants(place: Mapping[str, Any], /) -> None:
    """Show who there is."""
    with _tenants(place) as known:
        cards = known.list()
    for card in cards:
        state = "disabled" if card["disabled"] else "enabled"
        keys = ", ".join(each["id"] for each in card["keys"]) or "none"
        adapters = ", ".join(card.get("adapters", ())) or "own only"
        what = "" if card["role"] == "admin" else f"  weight {card['weight']:g}  {adapters}"
        click.echo(f"{card['name']}  {card['role']}  {state}  keys: {keys}{what}")


@tenants.command()
@click.argument("name")
@click.option(
    "--overlap",
    type=_Duration(),
    default="0s",
    show_default=True,
    help="For how long the keys it has stay good, as 24h.",
)
@click.pass_obj
def rotate(place: Mapping[str, Any], /, name: str, overlap: float) -> None:
    """Make another key in place of those there are, and show it, this once."""
    with _tenants(place) as known:
        _show_key(known.add_key(name, overlap)["key"])


@tenants.command()
@click.argument("name")
@click.pass_obj
def disable(place: Mapping[str, Any], /, name: str) -> None:
    """Refuse all keys of a tenant, from now on."""
    with _tenants(place) as known:
        known.change(name, {"disabled": True})
    click.echo(f"{name} is disabled")


@tenants.command()
@click.argument("name")
@click.pass_obj
def enable(place: Mapping[str, Any], /, name: str) -> None:
    """Take the keys of a disabled tenant again."""
    with _tenants(place) as known:
        known.change(name, {"disabled": False})
    click.echo(f"{name} is enabled")


def _show_key(key: str) -> None:
    click.echo("This key is shown once; only its hash is kept:", err=True)
    click.echo(key)


@contextmanager
def _tenants(place: Mapping[str, Any]) -> "Iterator[Tenants]":
    """Those of the database if no server has it, else of the running server."""
    # Here and not above, so that --help does not wait for the database's libraries.
    from ..state.database import StateError
    from .places import find_tenants

    try:
        with find_tenants(**place) as found:
            yield found
    except (TenantError, StateError) as error:
        raise click.UsageError(str(error)) from error
