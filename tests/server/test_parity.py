"""The foundation's proof: a batch of 20 requests over 16 adapters and the base, against PEFT."""

import asyncio
import random
import re
from pathlib import Path

import httpx
import pytest
from openai import AsyncOpenAI
from peft import LoraConfig

from deltamux.server.text.reader import read_tokenizer
from deltamux.server.text.tokenizer import Tokenizer

from .peft_oracle import Oracle
from .running import running_server

MAX_TOKENS = 40
LOGPROB_TOLERANCE = 2e-3
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

CONFIGS = {
    "r1-q": LoraConfig(r=1, lora_alpha=4, target_modules=["q_proj"]),
    "r2-all": LoraConfig(r=2, lora_alpha=4, target_modules=ALL_LINEAR),
    "r3-v": LoraConfig(r=3, lora_alpha=6, target_modules=["v_proj"]),
    "r4-qv": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "r4-down": LoraConfig(r=4, lora_alpha=4, target_modules=["down_proj"]),
    "r6-gate-k": LoraConfig(r=6, lora_alpha=6, target_modules=["gate_proj", "k_proj"]),
    "r8-attention": LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
    ),
    "r8-rslora": LoraConfig(r=8, lora_alpha=4, use_rslora=True, target_modules=ALL_LINEAR),
    "r8-bias": LoraConfig(r=8, lora_alpha=8, lora_bias=True, target_modules=["q_proj", "up_proj"]),
    "r8-pattern": LoraConfig(
        r=8,
        lora_alpha=8,
        target_modules=ALL_LINEAR,
        rank_pattern={r"layers\.[0-4]\.self_attn\.q_proj": 24, "down_proj": 3},
        alpha_pattern={"v_proj": 20, r"layers\.7\.mlp\.up_proj": 2},
    ),
    "r12-layers": LoraConfig(
        r=12, lora_alpha=12, target_modules=ALL_LINEAR, layers_to_transform=[0, 3, 29]
    ),
    "r16-all": LoraConfig(r=16, lora_alpha=16, target_modules=ALL_LINEAR),
    "r16-o": LoraConfig(r=16, lora_alpha=32, target_modules=["o_proj"]),
    "r32-up": LoraConfig(r=32, lora_alpha=16, target_modules=["up_proj", "down_proj"]),
    "r64-qk": LoraConfig(r=64, lora_alpha=32, target_modules=["q_proj", "k_proj"]),
    "r256-v": LoraConfig(r=256, lora_alpha=64, target_modules=["v_proj"]),
}


@pytest.fixture(scope="module")
def oracle(demo_base):
    return Oracle(demo_base)


@pytest.fixture(scope="module")
def adapters(oracle, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: oracle.save_adapter(config, folder / name, seed)
        for seed, (name, config) in enumerate(CONFIGS.items())
    }


@pytest.fixture(scope="module")
def requests(adapters, demo_base) -> list[tuple[str | None, list[int]]]:
    """(adapter, prompt) of 20 requests: every adapter once, the base four times."""
    text = (Path(__file__).parent / "prompts.txt").read_text()
    tokens = Tokenizer(read_tokenizer(demo_base)).encode(text)
    choose = random.Random(5)
    names = [*adapters, None, None, None, None]
    choose.shuffle(names)
    starts = [choose.randrange(len(tokens) - 200) for _ in names]
    return [
        (name, tokens[start : start + choose.choice([1, 7, 16, 33, 90, 150])])
        for name, start in zip(names, starts, strict=True)
    ]


@pytest.fixture(scope="module")
def expected(oracle, adapters, requests):
    return [
        oracle.generate(prompt, MAX_TOKENS, adapters[name] if name else None)
        for name, prompt in requests
    ]


def gauge(metrics: str, name: str) -> float:
    [value] = re.findall(rf"^{re.escape(name)}{{[^}}]*}} (\S+)$", metrics, re.MULTILINE)
    return float(value)


async def stream_all(url: str, requests) -> tuple[list, float]:
    """Each request's (token ids, log-probabilities), and how many ran once all had begun."""
    begun = asyncio.Barrier(len(requests) + 1)

    async def stream(client, name, prompt):
        token_ids, logprobs = [], []
        chunks = await client.completions.create(
            model=name or "base",
            prompt=prompt,
            max_tokens=MAX_TOKENS,
            temperature=0,
            logprobs=1,
            stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        async for chunk in chunks:
            if not token_ids:
                await begun.wait()
            for choice in chunk.choices:
                token_ids += choice.token_ids or []
                logprobs += choice.logprobs.token_logprobs if choice.logprobs else []
        return token_ids, logprobs

    async def count_running():
        await begun.wait()
        async with httpx.AsyncClient() as http:
            metrics = (await http.get(f"{url}/metrics")).text
        return gauge(metrics, "vllm:num_requests_running")

    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        streams = [stream(client, name, prompt) for name, prompt in requests]
        *results, running = await asyncio.gather(*streams, count_running())
    return results, running


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--max-num-batched-tokens", "24", "--max-num-seqs", "24", "--no-prefix-caching"),
        ("--kernels", "reference"),
    ],
    ids=["default", "tiny-chunks", "reference-kernels"],
)
def test_twenty_mixed_requests_equal_each_alone(
    options, demo_base, adapters, requests, expected, tmp_path
):
    serve = [f"--adapter={name}={path}" for name, path in adapters.items()]
    options = [*serve, "--dtype", "float32", "--served-model-name", "base", *options]
    with running_server(demo_base, *options, log=tmp_path / "log") as server:
        results, running = asyncio.run(stream_all(server.url, requests))
    if "--max-num-batched-tokens" not in options:
        assert running == len(requests)
    for (name, _), (token_ids, logprobs), wanted in zip(requests, results, expected, strict=True):
        assert token_ids == wanted.token_ids, name
        assert logprobs == pytest.approx(wanted.logprobs, abs=LOGPROB_TOLERANCE), name


def test_the_adapters_and_the_base_differ(requests, expected):
    """Otherwise the comparison above could not fail."""
    outputs = [tuple(generation.token_ids) for generation in expected]
    assert len(set(outputs)) == len(outputs)
