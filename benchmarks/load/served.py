"""What a server says of itself before anything is measured."""

from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from ..errors import BenchmarkError


@dataclass(frozen=True, slots=True)
class Served:
    """A server.

    Attributes:
        base: The first model without a parent; None if there is no such.
        adapters: The models with one.
        version: What its route /version answers; None where there is none.
    """

    base: str | None
    adapters: tuple[str, ...]
    version: object


def ask_server(base_url: str, key: str | None) -> Served:
    """Its models and its version.

    Raises:
        BenchmarkError: It does not answer as OpenAI's API does.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(base_url=base_url, headers=headers, trust_env=False) as client:
            response = client.get("/v1/models").raise_for_status()
            models = [(str(each["id"]), each.get("parent")) for each in response.json()["data"]]
            version = _version(client.get("/version"))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = str(error).partition("\n")[0]
        raise BenchmarkError(f"--base-url {base_url}: {reason}; is the server running?") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BenchmarkError(f"{base_url}/v1/models is no list of models") from error
    bases = [name for name, parent in models if parent is None]
    adapters = tuple(name for name, parent in models if parent is not None)
    return Served(bases[0] if bases else None, adapters, version)


def choose_models(
    served: Served, names: Sequence[str] | None, adapters: int | None
) -> tuple[str, ...]:
    """The names given, or the first ``adapters`` adapters, or the base.

    Raises:
        BenchmarkError: The server lists too few.
    """
    if names:
        return tuple(names)
    if adapters is None:
        if served.base is None:
            raise BenchmarkError("the server lists no base; give --models or --adapters")
        return (served.base,)
    if len(served.adapters) < adapters:
        raise BenchmarkError(
            f"--adapters {adapters}: the server lists {len(served.adapters)} adapters;"
            " load more first"
        )
    return served.adapters[:adapters]


def _version(response: httpx.Response) -> object:
    return response.json() if response.status_code == 200 else None
