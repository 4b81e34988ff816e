"""The engine in process, on tiny models of every family, against transformers and PEFT."""

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from deltamux.server.engine.errors import EngineMisconfigured
from deltamux.server.engine.messages import (
    AdapterLoaded,
    AdapterRefused,
    AdapterUnloaded,
    LoadAdapter,
)
from deltamux.server.generation import FinishReason, GenerationRequest

from .harness import EngineHarness, engine_config, make_request
from .peft_oracle import Generation, Oracle

MODULES = {
    "gpt2": (["c_attn"], ["c_attn", "c_proj", "c_fc"]),
    "default": (["q_proj", "v_proj"], ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"]),
}
FAMILIES = ["llama", "llama3", "mistral", "qwen2", "qwen3", "gpt2"]
VOCAB = 300


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    choose = random.Random(seed)
    lengths = [choose.choice([1, 3, 4, 5, 17, 40, 70]) for _ in range(count)]
    return [[choose.randrange(3, VOCAB) for _ in range(length)] for length in lengths]


def save_adapters(oracle: Oracle, family: str, folder) -> list:
    few, many = MODULES.get(family, MODULES["default"])
    variants = [
        {"r": 4, "lora_alpha": 8, "target_modules": few},
        {"r": 1, "lora_alpha": 1, "use_rslora": True, "target_modules": many},
        {"r": 24, "lora_alpha": 16, "target_modules": many, "layers_to_transform": [1]},
        {"r": 3, "lora_alpha": 8, "lora_bias": True, "target_modules": few},
        {"r": 2, "lora_alpha": 8, "target_modules": few, "rank_pattern": {few[0]: 20}},
    ]
    configs = [LoraConfig(fan_in_fan_out=family == "gpt2", **variant) for variant in variants]
    return [
        oracle.save_adapter(config, folder / str(index), index, size=0.1)
        for index, config in enumerate(configs)
    ]


@pytest.fixture
def harness():
    harnesses = []

    def make(model, **changes) -> EngineHarness:
        harnesses.append(EngineHarness(engine_config(model, **changes)))
        return harnesses[-1]

    yield make
    for each in harnesses:
        each.close()


@dataclass(frozen=True)
class Mixture:
    """18 requests over five adapters and the base, and what each gives alone."""

    model: Path
    adapters: list[Path]
    requests: list[GenerationRequest]
    expected: list[Generation]


@pytest.fixture(scope="module")
def mixture(tiny_model, tmp_path_factory):
    @cache
    def make(family: str) -> Mixture:
        model = tiny_model(family)
        oracle = Oracle(model)
        adapters = save_adapters(oracle, family, tmp_path_factory.mktemp(family))
        choices = list(zip(prompts(18), [None, *range(5)] * 3, strict=True))
        return Mixture(
            model,
            adapters,
            [
                make_request(str(index), prompt, adapter_id=adapter_id, max_tokens=40)
                for index, (prompt, adapter_id) in enumerate(choices)
            ],
            [
                oracle.generate(prompt, 40, None if adapter_id is None else adapters[adapter_id])
                for prompt, adapter_id in choices
            ],
        )

    return make


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_num_batched_tokens": 33, "prefix_caching": False},
        {"kernels": "reference"},
        {"memory_budget": 400_000},
    ],
    ids=["default", "small-chunks", "reference-kernels", "preempting"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_batches_equal_each_request_alone(family, changes, mixture, harness):
    mixed = mixture(family)
    engine = harness(mixed.model, **changes)
    for adapter_id, path in enumerate(mixed.adapters):
        assert isinstance(engine.load(adapter_id, path), AdapterLoaded)
    engine.submit(*mixed.requests)
    received = engine.run()
    for request, wanted in zip(mixed.requests, mixed.expected, strict=True):
        got = received[request.request_id]
        assert got.token_ids == wanted.token_ids, (request.request_id, got.error)
        assert got.logprobs == pytest.approx(wanted.logprobs, abs=2e-4)
        assert got.finish_reason is FinishReason.LENGTH
    assert bool(engine.preemptions) == ("memory_budget" in changes)


def test_a_repeated_prompt_is_taken_from_the_cache_of_its_own_adapter(
    tiny_model, harness, tmp_path
):
    model = tiny_model("llama")
    oracle = Oracle(model)
    adapters = save_adapters(oracle, "llama", tmp_path)
    engine = harness(model)
    for adapter_id in (0, 1):
        engine.load(adapter_id, adapters[adapter_id])
    prompt = next(p for p in prompts(20) if len(p) == 70)
    first = make_request("first", prompt, adapter_id=0)
    engine.submit(first)
    engine.run()
    engine.submit(
        make_request("same", prompt, adapter_id=0),
        make_request("other adapter", prompt, adapter_id=1),
        make_request("base", prompt),
        make_request("salted", prompt, adapter_id=0, cache_salt="x"),
    )
    received = engine.run()
    cached = {name: entry.num_cached_tokens for name, entry in received.items()}
    assert cached == {"first": 0, "same": 68, "other adapter": 0, "base": 0, "salted": 0}
    assert received["same"].token_ids == received["first"].token_ids
    assert received["salted"].token_ids == received["first"].token_ids
    assert received["base"].token_ids == oracle.generate(prompt, 12).token_ids
    wanted = oracle.generate(prompt, 12, adapters[1])
    assert received["other adapter"].token_ids == wanted.token_ids


def test_prompt_logprobs_are_those_of_transformers(tiny_model, harness):
    model = tiny_model("qwen2")
    oracle = Oracle(model)
    engine = harness(model, max_num_batched_tokens=32)
    long = next(p for p in prompts(20) if len(p) == 70)
    for name in ("cold", "after the same prompt"):
        engine.submit(make_request(name, long, prompt_logprobs=2))
        reports = engine.run()[name].prompt_logprobs
        with torch.inference_mode():
            rows = oracle.model(torch.tensor([long])).logits[0].log_softmax(-1)
        assert [report.token_id for report in reports] == long[1:]
        wanted = rows[:-1].gather(1, torch.tensor(long[1:])[:, None])[:, 0].tolist()
        assert [report.logprob for report in reports] == pytest.approx(wanted, abs=2e-4)
        top = rows[:-1].topk(2).indices.tolist()
        assert [[token for token, _ in report.top] for report in reports] == top


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_bfloat16_stays_close_to_the_library_in_bfloat16(family, mixture, harness):
    mixed = mixture(family)
    oracle = Oracle(mixed.model, torch.bfloat16)
    engine = harness(mixed.model, dtype="bfloat16")
    prompt = next(p for p in prompts(20) if len(p) == 70)
    for adapter_id, path in enumerate(mixed.adapters):
        engine.load(adapter_id, path)
        engine.submit(
            make_request(str(adapter_id), prompt, adapter_id=adapter_id, prompt_logprobs=0)
        )
    received = engine.run()
    for adapter_id, path in enumerate(mixed.adapters):
        got = [report.logprob for report in received[str(adapter_id)].prompt_logprobs]
        errors = torch.tensor(got) - oracle.prompt_logprobs(prompt, path)
        assert errors.abs().mean() < 0.05


def test_a_seed_gives_the_same_tokens_whatever_the_neighbours(tiny_model, harness):
    engine = harness(tiny_model("llama"))
    sampled = {"temperature": 1.0, "top_p": 0.95, "seed": 1234, "max_tokens": 20}
    [prompt, *others] = prompts(12, seed=3)
    engine.submit(make_request("alone", prompt, **sampled))
    engine.run()
    engine.submit(
        *(
            make_request(f"noise {index}", other, temperature=0.7, seed=index)
            for index, other in enumerate(others)
        ),
        make_request("in a crowd", prompt, **sampled),
        make_request("other seed", prompt, **{**sampled, "seed": 1235}),
    )
    received = engine.run()
    assert received["alone"].token_ids == received["in a crowd"].token_ids
    assert received["alone"].token_ids != received["other seed"].token_ids


def test_a_resumed_sequence_goes_on_as_if_it_had_never_stopped(tiny_model, harness):
    engine = harness(tiny_model("llama"))
    sampled = {"temperature": 1.0, "seed": 99, "max_tokens": 16}
    [prompt] = prompts(1, seed=8)
    whole = make_request("whole", prompt, **sampled)
    engine.submit(whole)
    tokens = engine.run()["whole"].token_ids
    resumed = make_request("resumed", prompt, **sampled)
    engine.submit(type(resumed)(**{**_fields(resumed), "output_token_ids": tokens[:7]}))
    assert engine.run()["resumed"].token_ids == tokens[7:]


def _fields(struct) -> dict:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def test_an_abort_frees_everything_within_the_step(tiny_model, harness):
    engine = harness(tiny_model("llama"))
    engine.submit(*(make_request(str(i), p, max_tokens=100) for i, p in enumerate(prompts(6))))
    engine.step()
    for index in range(6):
        engine.abort(str(index))
        engine.check_integrity()
    assert not engine.engine.has_work
    engine.abort("never existed")


def test_more_adapters_than_the_device_holds(tiny_model, harness, tmp_path):
    model = tiny_model("llama")
    oracle = Oracle(model)
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    adapters = [oracle.save_adapter(config, tmp_path / str(i), i, size=0.2) for i in range(8)]
    # One such adapter takes 2 layers * 8 * (64 + 64 + 64 + 32) * 4 = 14336 bytes: four fit at most.
    engine = harness(model, memory_budget=5 * 14400)
    for adapter_id, path in enumerate(adapters):
        engine.load(adapter_id, path)
    requests = [(p, i % 8) for i, p in enumerate(prompts(24))]
    engine.submit(
        *(
            make_request(str(index), prompt, adapter_id=adapter_id)
            for index, (prompt, adapter_id) in enumerate(requests)
        )
    )
    received = engine.run()
    for index, (prompt, adapter_id) in enumerate(requests):
        wanted = oracle.generate(prompt, 12, adapters[adapter_id])
        assert received[str(index)].token_ids == wanted.token_ids


def test_unload_waits_for_the_last_request_and_frees_all(tiny_model, harness, tmp_path):
    model = tiny_model("llama")
    adapters = save_adapters(Oracle(model), "llama", tmp_path)
    engine = harness(model)
    engine.load(1, adapters[0])
    engine.submit(make_request("running", [5, 6, 7], adapter_id=1))
    engine.step()
    engine.unload(1)
    assert not any(isinstance(event, AdapterUnloaded) for event in engine.adapter_events)
    engine.submit(make_request("late", [5, 6, 7], adapter_id=1))
    received = engine.run()
    assert received["running"].finish_reason is FinishReason.LENGTH
    assert received["late"].finish_reason is FinishReason.ERROR
    assert "not loaded" in received["late"].error
    assert engine.adapter_events[-1] == AdapterUnloaded(1)
    assert engine.host.ready() == []


def test_a_refused_adapter_is_gone_and_its_requests_are_told(tiny_model, harness, tmp_path):
    engine = harness(tiny_model("llama"))
    refused = engine.load(1, tmp_path / "nothing")
    assert isinstance(refused, AdapterRefused)
    assert refused.error == "AdapterNotFound"
    engine.submit(make_request("late", [5], adapter_id=1))
    assert engine.run()["late"].finish_reason is FinishReason.ERROR


def test_an_adapter_for_another_base_is_refused(tiny_model, harness, tmp_path):
    other = Oracle(tiny_model("llama", hidden_size=32, num_hidden_layers=3))
    [adapter, *_] = save_adapters(other, "llama", tmp_path)
    refused = harness(tiny_model("llama")).load(1, adapter)
    assert isinstance(refused, AdapterRefused)
    assert refused.error == "AdapterMismatch"


def test_a_load_that_fails_while_unloading_ends_its_requests(tiny_model, harness, tmp_path):
    engine = harness(tiny_model("llama"))
    engine.engine.handle(LoadAdapter(1, str(tmp_path / "nothing")))
    engine.submit(make_request("parked", [5], adapter_id=1))
    engine.unload(1)
    engine.wait_for_load()
    assert engine.received["parked"].finish_reason is FinishReason.ERROR
    assert engine.adapter_events == [AdapterUnloaded(1)]


def test_unloading_what_the_engine_does_not_know_is_answered(tiny_model, harness):
    engine = harness(tiny_model("llama"))
    engine.unload(7)
    assert engine.adapter_events == [AdapterUnloaded(7)]


def test_the_length_promised_is_the_length_that_fits(tiny_model, harness):
    engine = harness(tiny_model("llama"), memory_budget=60_000)
    assert engine.info.max_model_len == engine.info.num_blocks * engine.info.block_size < 256
    with pytest.raises(EngineMisconfigured, match="--memory-budget"):
        harness(tiny_model("llama"), memory_budget=60_000, max_model_len=200)
    with pytest.raises(EngineMisconfigured, match="256 positions"):
        harness(tiny_model("llama"), max_model_len=300)


def test_a_prompt_that_never_fits_is_refused_alone(tiny_model, harness):
    engine = harness(tiny_model("llama"))
    engine.submit(
        make_request("too long", [5] * 256), make_request("at the edge", [5] * 255, max_tokens=9)
    )
    received = engine.run()
    assert received["too long"].finish_reason is FinishReason.ERROR
    assert "256" in received["too long"].error
    assert received["at the edge"].finish_reason is FinishReason.LENGTH
    assert len(received["at the edge"].token_ids) == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"device": "cuda"}, "torch finds no NVIDIA GPU"),
        ({"dtype": "float16"}, "no float16 kernels for the CPU"),
        ({"kernels": "triton"}, "need a GPU"),
    ],
)
def test_what_the_device_cannot_do_is_refused(tiny_model, harness, monkeypatch, changes, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineMisconfigured, match=says):
        harness(tiny_model("llama"), **changes)
