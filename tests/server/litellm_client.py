"""What litellm gets from a server, as JSON; a program, as it leaves event loops and sockets open.

``python litellm_client.py URL TOOL``, the tool as JSON.
"""

import asyncio
import json
import sys
from typing import Any

import litellm

MESSAGES = [{"role": "user", "content": "Hello there"}]


def main(url: str, tool: dict[str, Any]) -> dict[str, Any]:
    """Answers by name."""
    litellm.suppress_debug_info = True  # it is printed among the answers
    server = {"api_base": url, "api_key": "none", "num_retries": 0}
    ask = {**server, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    found: dict[str, Any] = {}
    for provider in ("openai", "hosted_vllm"):
        whole = litellm.completion(f"{provider}/red", **ask)
        stream = litellm.completion(f"{provider}/red", stream=True, **ask)
        later = asyncio.run(litellm.acompletion(f"{provider}/red", **ask))
        found[provider] = {
            "whole": whole.choices[0].message.content,
            "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in stream),
            "async": later.choices[0].message.content,
        }
    forced = {"tools": [tool], "tool_choice": "required", "seed": 3, "messages": MESSAGES}
    called = litellm.completion("openai/red", **forced, **server)
    found["calls"] = [call.function.arguments for call in called.choices[0].message.tool_calls]
    texts = ["Hello there", "Hello where"]
    embedded = litellm.embedding("openai/red", input=texts, **server)
    found["vectors"] = [each["embedding"] for each in embedded.data]
    found["errors"] = [
        error_of("openai/nobody", **ask),
        error_of("openai/red", **{**ask, "temperature": 9}),
    ]
    return found


def error_of(model: str, **ask: Any) -> str:
    """The class of what a call raises."""
    try:
        litellm.completion(model, **ask)
    except (litellm.NotFoundError, litellm.BadRequestError) as error:
        return type(error).__name__
    return "none"


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]))))
