"""Requests that a server must answer, drawn from the whole space of what its API takes."""

from collections.abc import Callable
from random import Random
from typing import Any

Body = dict[str, Any]
Draw = Callable[[Random], Any]

MODELS = ("base", "red", "blue", "base:red")
WORDS = ("the quick brown fox", "Ünïcode 🦊 \u202e", "\x00\x01\x7f", "a\u0301", "1 + 1 =", "\n\n")
VOCABULARY = 300


def chance(draw: Random, probability: float) -> bool:
    """True as often as that."""
    return draw.random() < probability


def text(draw: Random) -> str:
    """A short text of odd characters."""
    return "".join(draw.choice(WORDS) for _ in range(draw.randint(1, 3)))


def token_ids(draw: Random) -> list[int]:
    """A prompt as ids."""
    return [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 60))]


def prompt(draw: Random) -> Any:
    """A prompt in one of its four forms."""
    form = draw.choice((text, token_ids))
    return form(draw) if chance(draw, 0.7) else [form(draw) for _ in range(draw.randint(1, 3))]


def bias(draw: Random) -> Body:
    """Biases of a few tokens."""
    return {str(draw.randrange(VOCABULARY)): draw.uniform(-100, 100) for _ in range(3)}


def stop(draw: Random) -> Any:
    """Stop strings in both forms."""
    strings = [draw.choice((" ", "the", "\n", "🦊", "\x00", "e" * 256)) for _ in range(3)]
    return strings[0] if chance(draw, 0.3) else strings


SAMPLING: dict[str, Draw] = {
    "temperature": lambda draw: draw.choice((0, 0.0, 1, 2, 1e-300, draw.uniform(0, 2))),
    "top_p": lambda draw: draw.choice((1, 1e-300, draw.uniform(0.01, 1))),
    "top_k": lambda draw: draw.choice((-1, 0, 1, 5, 2**31 - 1)),
    "min_p": lambda draw: draw.choice((0, 1, draw.random())),
    "repetition_penalty": lambda draw: draw.uniform(0.01, 100),
    "presence_penalty": lambda draw: draw.uniform(-2, 2),
    "frequency_penalty": lambda draw: draw.uniform(-2, 2),
    "logit_bias": bias,
    "seed": lambda draw: draw.choice((0, -1, -(2**63), 2**63 - 1, draw.getrandbits(40))),
    "stop": stop,
    "stop_token_ids": lambda draw: [draw.randrange(VOCABULARY) for _ in range(3)],
    "ignore_eos": lambda _: True,
    "skip_special_tokens": lambda _: False,
    "return_token_ids": lambda _: True,
    "return_tokens_as_token_ids": lambda _: True,
    "cache_salt": text,
    "priority": lambda draw: draw.randint(-9, 9),
    "user": text,
    "metadata": lambda _: {"deep": [[[{}]]]},
    "n": lambda draw: draw.randint(1, 4),
}


def random_schema(draw: Random, depth: int = 0) -> Body:
    """A JSON schema of finite outputs."""
    small: list[Body] = [
        {"enum": ["a", "ü", 1, None, True]},
        {"const": {"x": []}},
        {"type": "integer", "minimum": draw.randint(-9, 0), "maximum": draw.randint(1, 99)},
        {"type": "boolean"},
        {"type": "string", "maxLength": draw.randint(0, 5)},
        {"type": "string", "pattern": "^[a-c]{1,3}$"},
        {"type": "null"},
    ]
    if depth > 2 or chance(draw, 0.4):
        return draw.choice(small)
    parts = [random_schema(draw, depth + 1) for _ in range(draw.randint(1, 3))]
    whole: list[Body] = [
        {"anyOf": parts},
        {"type": "array", "items": parts[0], "maxItems": draw.randint(0, 3)},
        {
            "type": "object",
            "properties": {f"k{index}": part for index, part in enumerate(parts)},
            "required": [f"k{index}" for index in range(draw.randint(0, len(parts)))],
            "additionalProperties": False,
        },
    ]
    return draw.choice(whole)


def named_schema(draw: Random) -> Body:
    """OpenAI's way to say it."""
    return {"name": "x", "schema": random_schema(draw), "strict": chance(draw, 0.5)}


CONSTRAINTS: tuple[Draw, ...] = (
    lambda draw: {
        "response_format": {"type": "json_schema", "json_schema": named_schema(draw)},
    },
    lambda _: {"response_format": {"type": "json_object"}},
    lambda _: {"response_format": {"type": "text"}},
    lambda draw: {"guided_json": random_schema(draw)},
    lambda draw: {"guided_regex": draw.choice(("(a+)+$", "[0-9]{2,4}", "yes|no", "\\w{3}"))},
    lambda _: {"guided_choice": ["\x00", "\u202e", '"', "\\", "yes"]},
    lambda _: {"guided_grammar": 'start: "a" rest\nrest: "b" | "c" rest'},
    lambda draw: {"structured_outputs": {"json": random_schema(draw)}},
    lambda _: {"structured_outputs": {"regex": "a|b", "whitespace_pattern": " ?"}},
)


def generation(draw: Random, some: float = 0.12) -> Body:
    """What both routes share."""
    body: Body = {"model": draw.choice(MODELS), "max_tokens": draw.randint(1, 12)}
    body |= {name: make(draw) for name, make in SAMPLING.items() if chance(draw, some)}
    if chance(draw, 0.1):
        weights = (draw.uniform(-2, 2), draw.randint(-100, 100))
        body["model"] = "base"
        body["adapters"] = [
            {"name": name, "weight": weight}
            for name, weight in zip(("red", "blue"), weights, strict=True)
        ]
    if chance(draw, 0.1):
        body["min_tokens"] = draw.randint(0, body["max_tokens"])
    return body | _answer(draw, body)


def _answer(draw: Random, body: Body) -> Body:
    """Streamed or not, and what goes with either alone."""
    if chance(draw, 0.4):
        options = {"include_usage": chance(draw, 0.5), "continuous_usage_stats": chance(draw, 0.5)}
        return {"stream": True, **({"stream_options": options} if chance(draw, 0.5) else {})}
    if chance(draw, 0.1):
        return {"best_of": body.get("n", 1) + draw.randint(0, 2)}
    return {"prompt_logprobs": draw.randint(0, 5)} if chance(draw, 0.1) else {}


def completion(draw: Random) -> tuple[str, Body]:
    """``/v1/completions``."""
    if chance(draw, 0.05):
        return "/v1/completions", beams(draw)
    body = generation(draw) | {"prompt": prompt(draw)}
    if chance(draw, 0.15):
        body["logprobs"] = draw.randint(0, 20)
    if chance(draw, 0.1):
        body["echo"] = True
    if chance(draw, 0.15):
        body |= draw.choice(CONSTRAINTS)(draw)
    return "/v1/completions", body


def beams(draw: Random) -> Body:
    """A beam search."""
    n = draw.randint(1, 3)
    return {
        "model": draw.choice(MODELS),
        "prompt": text(draw),
        "max_tokens": draw.randint(1, 8),
        "use_beam_search": True,
        "n": n,
        "beam_width": n + draw.randint(0, 2),
        "length_penalty": draw.uniform(-2, 2),
        **({"logprobs": 2} if chance(draw, 0.3) else {}),
    }


def tool(name: str, draw: Random) -> Body:
    """A function of a random schema."""
    parameters = {
        "type": "object",
        "properties": {"a": random_schema(draw, depth=2), "b": random_schema(draw, depth=2)},
        "required": ["a"],
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def turns(draw: Random) -> list[Body]:
    """A conversation, some of them with calls."""
    content = text(draw) if chance(draw, 0.8) else [{"type": "text", "text": text(draw)}]
    found: list[Body] = [{"role": "system", "content": text(draw)}] if chance(draw, 0.3) else []
    found.append({"role": "user", "content": content})
    if chance(draw, 0.2):
        call = {"name": "f", "arguments": '{"a": 1}'}
        calls = [{"id": "c1", "type": "function", "function": call}]
        found.append({"role": "assistant", "content": None, "tool_calls": calls})
        found.append({"role": "tool", "tool_call_id": "c1", "content": text(draw)})
    return found


def chat(draw: Random) -> tuple[str, Body]:
    """``/v1/chat/completions``."""
    body = generation(draw) | {"messages": turns(draw)}
    if chance(draw, 0.2):
        body |= {"logprobs": True, "top_logprobs": draw.randint(0, 20)}
    if chance(draw, 0.1):
        body["max_completion_tokens"] = body["max_tokens"]
    if chance(draw, 0.25):
        body["tools"] = [tool(name, draw) for name in ("f", "g")[: draw.randint(1, 2)]]
        named = {"type": "function", "function": {"name": "f"}}
        choice = draw.choice(("auto", "none", "required", named, None))
        body |= {"tool_choice": choice, "parallel_tool_calls": chance(draw, 0.5)}
    elif chance(draw, 0.15):
        body |= draw.choice(CONSTRAINTS)(draw)
    return "/v1/chat/completions", body


def tokenize(draw: Random) -> tuple[str, Body]:
    """``/tokenize`` and ``/detokenize``."""
    if chance(draw, 0.3):
        return "/detokenize", {"tokens": token_ids(draw)}
    if chance(draw, 0.3):
        return "/tokenize", {"messages": turns(draw), "model": draw.choice(MODELS)}
    return "/tokenize", {"prompt": text(draw), "return_token_strs": chance(draw, 0.5)}


def embedding(draw: Random) -> tuple[str, Body]:
    """``/v1/embeddings``."""
    body: Body = {"model": draw.choice(MODELS), "input": prompt(draw)}
    if chance(draw, 0.5):
        body["encoding_format"] = draw.choice(("float", "base64"))
    if chance(draw, 0.1):
        body["cache_salt"] = text(draw)
    return "/v1/embeddings", body


GOOD: tuple[Callable[[Random], tuple[str, Body]], ...] = (
    completion,
    completion,
    completion,
    chat,
    chat,
    chat,
    embedding,
    tokenize,
)


def good(draw: Random) -> tuple[str, Body]:
    """The path and body of a request that must be answered with 200."""
    return draw.choice(GOOD)(draw)
