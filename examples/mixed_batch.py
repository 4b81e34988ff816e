"""One prompt to the base model and to every adapter at once: one batch, as many answers as models.

Needs a server that runs on this machine (``make serve``), because only to it are the kinds of the
adapters told, and the openai client (``pip install openai``).
"""

import argparse
import asyncio
import time
from dataclasses import dataclass

import httpx
from openai import AsyncOpenAI


@dataclass(frozen=True)
class Answer:
    """What one model said, and how long it took."""

    model: str
    text: str
    first_token_ms: float
    total_ms: float


async def ask(client: AsyncOpenAI, model: str, prompt: str, max_tokens: int) -> Answer:
    """Stream one greedy answer."""
    start = time.perf_counter()
    first: float | None = None
    text = ""
    chunks = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=max_tokens,
        stream=True,
    )
    async for chunk in chunks:
        piece = chunk.choices[0].delta.content if chunk.choices else None
        if piece:
            first = first or time.perf_counter()
            text += piece
    end = time.perf_counter()
    return Answer(model, text, 1e3 * ((first or end) - start), 1e3 * (end - start))


async def kinds(client: AsyncOpenAI) -> dict[str, str]:
    """Every model's kind of adapter, the base's first."""
    adapters = (await client.get("/adapters", cast_to=httpx.Response)).json()["data"]
    known = {card["name"]: card["info"]["kind"] for card in adapters if card["state"] == "ready"}
    return {model.id: known.get(model.id, "base") async for model in client.models.list()}


async def run(url: str, prompt: str, max_tokens: int) -> None:
    """Ask all models at once and print their answers as a table."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        models = await kinds(client)
        start = time.perf_counter()
        answers = await asyncio.gather(*(ask(client, m, prompt, max_tokens) for m in models))
        wall = time.perf_counter() - start
    times = f"{'first token':>11} | {'answer done':>11}"
    print(f"| {'model':<9} | {'kind':<13} | {times} | answer to: {prompt} |")
    print("|---|---|---|---|---|")
    for a in answers:
        shown = a.text.strip().replace("\n", " / ")
        times = f"{a.first_token_ms:>8.0f} ms | {a.total_ms:>8.0f} ms"
        print(f"| {a.model:<9} | {models[a.model]:<13} | {times} | {shown} |")
    print(f"\n{len(answers)} requests in one batch: {wall:.2f} s")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Ask the base and every adapter at once.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--prompt", default="What is the capital of Germany?")
    parser.add_argument("--max-tokens", type=int, default=48)
    arguments = parser.parse_args()
    asyncio.run(run(arguments.url, arguments.prompt, arguments.max_tokens))


if __name__ == "__main__":
    main()
