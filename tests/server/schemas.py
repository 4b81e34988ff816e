"""Sixteen JSON schemas, each of whose texts is short: even a random model comes to its end."""

from typing import Any


def closed(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SHORT = {"type": "string", "maxLength": 6}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}

SCHEMAS: dict[str, dict[str, Any]] = {
    "boolean": {"type": "boolean"},
    "integer": {"type": "integer", "minimum": -40, "maximum": 250},
    "number": closed(
        part={"type": "number", "minimum": 0, "exclusiveMaximum": 1, "multipleOf": 0.5}
    ),
    "string": closed(name={"type": "string", "minLength": 2, "maxLength": 8}),
    "enum": closed(
        kind={"enum": ["a", "b c", 3, None, 'q"u\\ote', "\u00e9"]}, right={"const": True}
    ),
    "pattern": closed(plate={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}),
    "date": closed(day={"type": "string", "format": "date"}),
    "uuid": closed(id={"type": "string", "format": "uuid"}),
    "array": {"type": "array", "items": DIGIT, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [DIGIT, SHORT], "items": False, "minItems": 2},
    "optional": {
        "type": "object",
        "properties": {"one": DIGIT, "two": SHORT, "three": {"type": "null"}},
        "required": ["two"],
        "additionalProperties": False,
    },
    "nested": closed(inner=closed(list={"type": "array", "items": closed(x=DIGIT), "maxItems": 2})),
    "any of": {"anyOf": [DIGIT, closed(text=SHORT), {"type": "null"}]},
    "reference": {
        "$defs": {"point": closed(x=DIGIT, y=DIGIT)},
        **closed(from_={"$ref": "#/$defs/point"}, to={"$ref": "#/$defs/point"}),
    },
    "definitions": {
        "$defs": {"leaf": DIGIT, "tree": closed(left={"$ref": "#/$defs/leaf"}, right=DIGIT)},
        "$ref": "#/$defs/tree",
    },
    "named": {
        "type": "object",
        "properties": {"id": DIGIT},
        "required": ["id"],
        "patternProperties": {"^k[0-9]$": {"type": "boolean"}},
        "additionalProperties": False,
        "maxProperties": 3,
    },
}
