"""Bodies of the routes that manage adapters."""

from collections.abc import Mapping
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from ..store.entries import DIGEST_CHARACTERS, plain_digest
from .body import Body

_INT64_MAX = 2**63 - 1


def _checked_digest(text: str) -> str:
    digest = plain_digest(text)
    if len(digest) != DIGEST_CHARACTERS or not set(digest) <= set("0123456789abcdef"):
        raise ValueError("a digest is the 64 hexadecimal digits that `deltamux inspect` prints")
    return digest


Digest = Annotated[str, AfterValidator(_checked_digest)]


class AdapterFields(Body):
    """What ``POST /v1/adapters`` says of an adapter however its files come.

    Attributes:
        name: What requests will call it.
        digest: What its files must hash to.
        replace: Whether the name may be taken; the files become a new version of it then.
    """

    name: str
    digest: Digest | None = None
    replace: bool = False


class AdapterBody(AdapterFields):
    """``POST /v1/adapters`` in JSON.

    Attributes:
        source: A path or a URL; ``path`` is the same.
        wait: Whether to answer when the adapter is served, or as soon as it is registered.
    """

    source: str = ""
    path: str = ""
    wait: bool = True

    @property
    def place(self) -> str:
        """Where the files are."""
        return self.source or self.path

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if bool(self.source) == bool(self.path):
            raise ValueError("name the adapter's files once, by 'source' (a path or a URL)")
        return self


def _form() -> dict[str, object]:
    schema = AdapterFields.model_json_schema()
    archive = {"type": "string", "format": "binary", "description": "A .tar, .tar.gz or .zip."}
    schema["properties"]["archive"] = archive
    schema["required"] = [*schema["required"], "archive"]
    return schema


NEW_ADAPTER: Mapping[str, object] = {
    "required": True,
    "content": {
        "application/json": {"schema": AdapterBody.model_json_schema()},
        "multipart/form-data": {"schema": _form()},
    },
}
"""OpenAPI's word for the body of ``POST /v1/adapters``, which may come in two ways."""


class ChangeAdapterBody(Body):
    """``PATCH /v1/adapters/{name}``.

    Attributes:
        pinned: Whether the default version is to stay in memory.
        version: The beginning of the digest of the version that becomes the default.
        rollback: Whether the version registered before the default one becomes the default.
    """

    pinned: bool | None = None
    version: str | None = Field(default=None, min_length=1)
    rollback: bool = False

    @model_validator(mode="after")
    def _one_change(self) -> Self:
        if self.rollback and self.version is not None:
            raise ValueError("give 'version' or 'rollback', not both")
        if self.pinned is None and self.version is None and not self.rollback:
            raise ValueError("give 'pinned', 'version' or 'rollback'")
        return self


class LoadLoraBody(Body):
    """vLLM's ``POST /v1/load_lora_adapter``."""

    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool = False


class UnloadLoraBody(Body):
    """vLLM's ``POST /v1/unload_lora_adapter``."""

    lora_name: str = ""
    lora_int_id: int | None = Field(default=None, ge=0, le=_INT64_MAX)
