"""What every request body shares.

Three rules hold for all of them. A null means the default. A field nobody knows is refused by name.
A field of the OpenAI or vLLM API that this release does not serve is refused by name unless it has
the value that asks for nothing.
"""

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_FIELDS = 128
MAX_DEPTH = 100
"""Of fields that may hold anything; what reads them goes down to some depth only."""

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1

_ANYTHING = object()
# Accepted and without effect: they describe the caller, not the answer.
_INERT: dict[str, object] = dict.fromkeys(("user", "metadata", "safety_identifier"), _ANYTHING)
# Fields of a later release or of no release, with the values that ask for nothing.
_ASKS_NOTHING: dict[str, tuple[object, ...]] = {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "parallel_tool_calls": (True, False),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "guided_decoding_backend": ("auto", "guidance"),
    "modalities": (["text"],),
    "suffix": ("",),
}

Text = Annotated[str, Field(min_length=1)]


def refuse(param: str, message: str) -> PydanticCustomError:
    """A validation error of a whole body that still names the field at fault."""
    return PydanticCustomError("refused", "{message}", {"message": message, "param": param})


class Body(BaseModel):
    """What every request body shares."""

    # A bound on text, and it may be any, makes pydantic refuse lone surrogates: they are no UTF-8
    # and could reach neither the tokenizer nor the engine.
    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, str_max_length=INT32_MAX
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_nothing(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        if len(data) > MAX_FIELDS:
            # Collecting an error for each of a million unknown fields would hold up every stream.
            raise PydanticCustomError("fields", "more than {n} fields", {"n": MAX_FIELDS})
        return {
            name: value
            for name, value in data.items()
            if value is not None and not cls._asks_nothing(name, value)
        }

    @classmethod
    def _asks_nothing(cls, name: str, value: object) -> bool:
        if name in cls.model_fields:
            return False
        if name in _INERT:
            return True
        if name not in _ASKS_NOTHING:
            return False
        if any(type(value) is type(idle) and value == idle for idle in _ASKS_NOTHING[name]):
            return True
        raise refuse(name, f"{name!r} is not served by this release; leave it out.")


def is_json(value: dict[str, Any]) -> dict[str, Any]:
    """Refuse what Python reads as JSON and others do not, in fields that may hold anything.

    Raises:
        ValueError: Lone surrogates, NaN and infinities; UnicodeEncodeError is one.
        PydanticCustomError: It is nested more than ``MAX_DEPTH`` deep.
    """
    if _is_deeper(value, MAX_DEPTH):
        raise PydanticCustomError("depth", "it is nested more than {n} deep", {"n": MAX_DEPTH})
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    return value


def _is_deeper(value: object, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(each, levels - 1) for each in inner)


JsonObject = Annotated[dict[str, Any], AfterValidator(is_json)]
