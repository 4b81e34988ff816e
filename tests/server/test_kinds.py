"""Every kind of adapter, all of them in one batch, against the library that made each."""

import asyncio
import random
from collections import defaultdict
from functools import cache
from pathlib import Path

import httpx
import pytest
import torch

from deltamux.server.engine.messages import AdapterLoaded
from deltamux.server.generation import FinishReason

from ..kinds import (
    FAMILIES,
    Case,
    base_cases,
    demo_variants,
    golden_cases,
    goldens,
    names,
    peft_cases,
    plain_cases,
    variants,
)
from ..peft_zoo import PeftOracle
from .harness import EngineHarness, engine_config, make_request
from .running import running_server

TOLERANCE = 2e-3
BUDGET = 2_600_000
"""Bytes on the device where sequences are preempted: of half the adapters, and no key or value."""
ROOM = ("--memory-budget", "1GiB", "--host-memory-budget", "2GiB", "--dtype", "float32")


@pytest.fixture(scope="module")
def cases(tiny_model, tmp_path_factory):
    """All cases of a family: of every adapter at least one, and some of the base."""

    @cache
    def make(family: str) -> list[Case]:
        oracle = PeftOracle(tiny_model(family))
        folder = tmp_path_factory.mktemp(f"zoo-{family}")
        found = [
            *peft_cases(oracle, variants(family), folder),
            *golden_cases(family),
            *plain_cases(oracle, folder / "plain"),
            *base_cases(oracle),
        ]
        random.Random(7).shuffle(found)
        return found

    return make


def folders(cases: list[Case]) -> dict[str, Path]:
    return {case.name: case.folder for case in cases if case.name is not None}


async def ask(url: str, cases: list[Case]) -> list[httpx.Response]:
    """All at once."""
    limits = httpx.Limits(max_connections=len(cases))
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
        return await asyncio.gather(
            *(
                http.post(
                    "/v1/completions",
                    json={
                        "model": case.name or "base",
                        "prompt": case.prompt,
                        "max_tokens": len(case.token_ids),
                        "temperature": 0,
                        "logprobs": 1,
                        "ignore_eos": True,
                        "return_token_ids": True,
                    },
                )
                for case in cases
            )
        )


def differences(case: Case, answer: httpx.Response) -> str | None:
    """What of an answer is not the library's; None if nothing."""
    if answer.status_code != 200:
        return answer.text
    [choice] = answer.json()["choices"]
    if choice["token_ids"] != case.token_ids:
        return f"{choice['token_ids']} instead of {case.token_ids}, {len(case.prompt)} before"
    worst = max(
        abs(got - wanted)
        for got, wanted in zip(choice["logprobs"]["token_logprobs"], case.logprobs, strict=True)
    )
    return None if worst <= TOLERANCE else f"log-probabilities differ by {worst}"


def served_answers(
    model: Path, cases: list[Case], folder: Path, **env: str
) -> dict[str, list[str]]:
    """Serve all adapters at once, ask for all cases at once: what is wrong, by adapter."""
    adapters = folder / "adapters"
    adapters.mkdir()
    for name, saved in folders(cases).items():
        (adapters / name).symlink_to(saved, target_is_directory=True)
    options = ("--served-model-name", "base", "--adapter-dir", str(adapters), *ROOM)
    options = (*options, "--max-num-seqs", "64")
    with running_server(model, *options, log=folder / "log", **env) as server:
        answers = asyncio.run(ask(server.url, cases))
    wrong = defaultdict(list)
    for case, answer in zip(cases, answers, strict=True):
        found = differences(case, answer)
        wrong[case.name or "base"] += [] if found is None else [found]
    return dict(wrong)


@pytest.fixture(scope="module")
def served(cases, tiny_model, tmp_path_factory):
    @cache
    def serve(family: str) -> dict[str, list[str]]:
        return served_answers(tiny_model(family), cases(family), tmp_path_factory.mktemp(family))

    return serve


@pytest.mark.parametrize(
    ("family", "adapter"),
    [
        pytest.param(family, name, id=f"{family}-{name}")
        for family in FAMILIES
        for name in ["base", *names(family)]
    ],
)
def test_served(family, adapter, served):
    """Tokens and log-probabilities of the library, with every other adapter in the same batch."""
    assert served(family)[adapter] == []


@pytest.fixture
def harness():
    harnesses = []

    def make(model, **changes) -> EngineHarness:
        room = {"memory_budget": 64 << 20, "host_memory_budget": 1 << 30}
        harnesses.append(EngineHarness(engine_config(model, **{**room, **changes})))
        return harnesses[-1]

    yield make
    for each in harnesses:
        each.close()


def load_all(engine: EngineHarness, cases: list[Case]) -> dict[str, int]:
    """Adapter ids by name."""
    ids = {name: number for number, name in enumerate(folders(cases), start=1)}
    for name, folder in folders(cases).items():
        answer = engine.load(ids[name], folder)
        assert isinstance(answer, AdapterLoaded), (name, answer)
    return ids


@pytest.mark.parametrize(
    "changes",
    [
        {"max_num_batched_tokens": 33, "prefix_caching": False},
        {"max_num_batched_tokens": 32, "block_size": 16},
        {"kernels": "reference"},
    ],
    ids=["tiny-chunks", "large-blocks", "reference-kernels"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_kinds_in_one_batch(family, changes, cases, harness, tiny_model):
    """However prompts are cut and blocks are sized; twice, so that the second finds blocks."""
    chosen = cases(family)
    engine = harness(tiny_model(family), **changes)
    ids = load_all(engine, chosen)
    for again in (False, True):
        requests = {
            f"{again}-{index}": make_request(
                f"{again}-{index}",
                case.prompt,
                adapter_id=ids.get(case.name),
                max_tokens=len(case.token_ids),
            )
            for index, case in enumerate(chosen)
        }
        engine.submit(*requests.values())
        received = engine.run()
        for name, case in zip(requests, chosen, strict=True):
            got = received[name]
            assert got.error is None, (case.name, got.error)
            assert got.token_ids == case.token_ids, case.name
            assert got.logprobs == pytest.approx(case.logprobs, abs=TOLERANCE), case.name
            assert got.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("family", FAMILIES)
def test_all_kinds_survive_preemption(family, cases, harness, tiny_model):
    """More adapters and keys than fit at once: blocks move, and many sequences are thrown out."""
    chosen = [case for case in cases(family) if len(case.prompt) < 60]
    engine = harness(
        tiny_model(family), memory_budget=BUDGET, max_num_seqs=128, max_num_batched_tokens=512
    )
    ids = load_all(engine, chosen)
    engine.submit(
        *(
            make_request(
                str(index),
                case.prompt,
                adapter_id=ids.get(case.name),
                max_tokens=len(case.token_ids),
            )
            for index, case in enumerate(chosen)
        )
    )
    received = engine.run()
    assert engine.preemptions
    for index, case in enumerate(chosen):
        got = received[str(index)]
        assert (got.error, got.token_ids) == (None, case.token_ids), case.name
        assert got.logprobs == pytest.approx(case.logprobs, abs=TOLERANCE), case.name


@pytest.mark.parametrize("family", FAMILIES)
def test_all_kinds_in_bfloat16(family, cases, harness, tiny_model):
    """One batch, every prompt token: within 0.05 of the library, on average over a prompt.

    PEFT computes in bfloat16 too; of AdapterHub there is what it gave in float32.
    """
    oracle = PeftOracle(tiny_model(family), torch.bfloat16)
    engine = harness(tiny_model(family), dtype="bfloat16")
    ids = load_all(engine, cases(family))
    wanted = {}
    for case in cases(family):
        if case.name is not None and case.name.startswith("peft-"):
            prompt = [*random.Random(3).choices(range(3, 300), k=20), *case.prompt]
            wanted[case.name] = prompt, oracle.prompt_logprobs(prompt, case.folder)
    for golden in goldens(family):
        found = zip(golden.expected.prompts, golden.expected.prompt_logprobs, strict=True)
        prompt, logprobs = max(found, key=lambda pair: len(pair[0]))
        wanted[f"adapterhub-{golden.name}"] = prompt, torch.tensor(logprobs)
    engine.submit(
        *(
            make_request(name, prompt, adapter_id=ids[name], prompt_logprobs=0, max_tokens=1)
            for name, (prompt, _) in wanted.items()
        )
    )
    received = engine.run()
    errors = {}
    for name, (_, logprobs) in wanted.items():
        got = [report.logprob for report in received[name].prompt_logprobs]
        errors[name] = float((torch.tensor(got) - logprobs).abs().mean())
    assert {name: error for name, error in errors.items() if not error < 0.05} == {}


def test_every_kind_on_the_demo_base(demo_base, tmp_path_factory):
    """One variant of every kind on SmolLM2-135M, all in one batch."""
    oracle = PeftOracle(demo_base)
    folder = tmp_path_factory.mktemp("demo-zoo")
    found = [
        *peft_cases(oracle, demo_variants(), folder, max_tokens=4),
        *golden_cases("smollm2"),
        *base_cases(oracle, max_tokens=4),
    ]
    wrong = served_answers(demo_base, found, tmp_path_factory.mktemp("demo"))
    assert {name: faults for name, faults in wrong.items() if faults} == {}
