"""Beam search, against transformers' own, with adapters and beside other requests."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import openai
import pytest
import torch
from peft import LoraConfig

from deltamux.server.generation import BeamSearch, FinishReason, GenerationRequest

from .harness import EngineHarness, engine_config, make_request
from .peft_oracle import Oracle
from .running import running_server

PROMPTS = [[5, 40, 61, 7], [90, 91, 92, 93, 94, 95, 96, 97], [33]]
LONGEST = 24
PAD = 299
ADAPTERS = [
    LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    LoraConfig(r=16, lora_alpha=16, target_modules=["up_proj", "down_proj"]),
]


@dataclass(frozen=True)
class Case:
    """A search; ``ends`` are tokens that end an output."""

    prompt: int
    width: int
    length_penalty: float
    adapter: int | None
    ends: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return str(self)


@dataclass(frozen=True)
class Answer:
    token_ids: list[int]
    score: float


@pytest.fixture(scope="module")
def model(tiny_model) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def oracle(model) -> Oracle:
    return Oracle(model)


@pytest.fixture(scope="module")
def adapters(oracle, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [
        oracle.save_adapter(config, folder / str(seed), seed, size=0.1)
        for seed, config in enumerate(ADAPTERS)
    ]


@pytest.fixture(scope="module")
def searched(oracle, adapters) -> dict[Case, list[Answer]]:
    """What transformers finds; ends are taken from what it finds without any."""
    found: dict[Case, list[Answer]] = {}
    grid = product((2, 3, 4, 5, 6), (1.0, 0.0, 2.0, -1.0, 0.6))
    for number, (width, penalty) in enumerate(grid):
        prompt, adapter = [(0, None), (1, 0), (2, 1)][number % 3]
        endless = Case(prompt, width, penalty, adapter)
        with oracle._with(None if adapter is None else adapters[adapter]) as generator:
            found[endless] = search(generator, endless)
            best = found[endless][0].token_ids
            for ends in ((best[2],), (best[9], best[15])):
                ending = replace(endless, ends=tuple(set(ends)))
                found[ending] = search(generator, ending)
    return found


@torch.inference_mode()
def search(generator, case: Case) -> list[Answer]:
    prompt = PROMPTS[case.prompt]
    found = generator.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=LONGEST,
        num_beams=case.width,
        num_return_sequences=case.width,
        length_penalty=case.length_penalty,
        do_sample=False,
        eos_token_id=list(case.ends) or None,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_scores=True,
    )
    rows = [row[len(prompt) :].tolist() for row in found.sequences]
    scores = found.sequences_scores.tolist()
    return [Answer(until_end(row, case), score) for row, score in zip(rows, scores, strict=True)]


def until_end(row: list[int], case: Case) -> list[int]:
    ends = (place for place, token_id in enumerate(row, 1) if token_id in case.ends)
    return row[: next(ends, len(row))]


def request(case: Case) -> GenerationRequest:
    return make_request(
        case.name,
        PROMPTS[case.prompt],
        adapter_id=case.adapter,
        max_tokens=LONGEST,
        end_token_ids=case.ends,
        logprobs=case.width + len(case.ends),
        beams=BeamSearch(case.width, case.length_penalty, case.width),
    )


@pytest.fixture
def engine(model, adapters) -> Iterator[Callable[..., EngineHarness]]:
    made: list[EngineHarness] = []

    def make(**changes) -> EngineHarness:
        harness = EngineHarness(engine_config(model, **changes))
        made.append(harness)
        for adapter_id, path in enumerate(adapters):
            harness.load(adapter_id, path)
        return harness

    yield make
    for each in made:
        each.close()


def assert_found(harness: EngineHarness, searched: dict[Case, list[Answer]]) -> None:
    for case, expected in searched.items():
        found = harness.beams[case.name]
        tokens = [[token.token_id for token in answer.tokens] for answer in found]
        assert tokens == [answer.token_ids for answer in expected], case
        scores = [answer.score for answer in found]
        assert scores == pytest.approx([answer.score for answer in expected], abs=2e-3)
        for answer in found:
            ended = answer.tokens[-1].token_id in case.ends
            assert (answer.finish_reason is FinishReason.STOP) == ended


def some(searched: dict[Case, list[Answer]], count: int) -> dict[Case, list[Answer]]:
    return {case: searched[case] for case in random.Random(0).sample(list(searched), count)}


def test_searches_are_those_of_transformers(engine, searched):
    """All in one engine, beside each other, with adapters; of every width and penalty."""
    harness = engine(max_num_seqs=24)
    harness.submit(*map(request, searched))
    harness.run()
    assert_found(harness, searched)
    reasons = {answer.finish_reason for each in harness.beams.values() for answer in each}
    assert reasons == {FinishReason.STOP, FinishReason.LENGTH}


@pytest.mark.parametrize("caching", [True, False], ids=["cached", "uncached"])
def test_a_search_that_is_preempted_goes_on_where_it_was(engine, searched, caching):
    """In a cache that holds little more than one search, beside requests that come and go."""
    chosen = some(searched, 20)
    harness = engine(
        memory_budget=200_000, max_model_len=40, max_num_seqs=40, prefix_caching=caching
    )
    plain = [make_request(str(i), [7, 8, 9 + i], max_tokens=20) for i in range(6)]
    for case, other in zip(chosen, [*plain, *[None] * 14], strict=True):
        harness.submit(request(case), *([] if other is None else [other]))
    harness.run()
    assert harness.preemptions > 0
    assert_found(harness, chosen)
    alone = engine()
    alone.submit(*plain)
    alone.run()
    for each in plain:
        received = harness.received[each.request_id]
        assert received.token_ids == alone.received[each.request_id].token_ids


def test_a_search_shares_the_blocks_of_its_prompt(engine):
    """Six beams of a long prompt take its blocks once."""
    harness = engine(block_size=4)
    prompt = [5 + i % 200 for i in range(100)]
    harness.submit(make_request("r", prompt, max_tokens=8, logprobs=6, beams=BeamSearch(6, 1.0, 6)))
    used = 0
    while harness.engine.has_work:
        harness.step()
        used = max(used, harness.engine._blocks.num_used)
    assert used <= len(prompt) // 4 + 6 * (8 // 4 + 1)


def test_an_aborted_search_leaves_nothing(engine):
    harness = engine()
    case = Case(0, 4, 1.0, 0)
    harness.submit(request(case))
    for _ in range(4):
        harness.step()
    harness.abort(case.name)
    harness.run()
    assert harness.engine._blocks.num_used == 0
    assert case.name not in harness.beams


def test_a_search_that_is_wider_than_a_step_is_refused(engine):
    harness = engine(max_num_seqs=3)
    harness.submit(request(Case(0, 4, 1.0, None)))
    harness.run()
    assert "--max-num-seqs" in harness.received[Case(0, 4, 1.0, None).name].error


@pytest.fixture(scope="module")
def client(model, adapters, tmp_path_factory) -> Iterator[openai.OpenAI]:
    log = tmp_path_factory.mktemp("log") / "log"
    options = [f"--adapter={number}={path}" for number, path in enumerate(adapters)]
    options += ["--served-model-name", "base", "--memory-budget", "4MiB", "--dtype", "float32"]
    with (
        running_server(model, *options, log=log, OMP_NUM_THREADS="1") as running,
        openai.OpenAI(base_url=running.openai_url, api_key="none", max_retries=0) as made,
    ):
        yield made


def ask(client: openai.OpenAI, case: Case, **fields) -> openai.types.Completion:
    extra = {
        "use_beam_search": True,
        "beam_width": case.width,
        "length_penalty": case.length_penalty,
        "ignore_eos": True,
        "stop_token_ids": list(case.ends),
        "return_token_ids": True,
    }
    model = "base" if case.adapter is None else str(case.adapter)
    return client.completions.create(
        **{"model": model, "prompt": PROMPTS[case.prompt], "max_tokens": LONGEST, **fields},
        extra_body=extra,
    )


def test_searches_over_the_api(client, searched):
    for case in some(searched, 6):
        answer = ask(client, case, n=2, logprobs=1)
        expected = searched[case][:2]
        assert [each.token_ids for each in answer.choices] == [each.token_ids for each in expected]
        assert answer.usage.completion_tokens == sum(len(each.token_ids) for each in expected)
        for choice, one in zip(answer.choices, expected, strict=True):
            total = sum(choice.logprobs.token_logprobs)
            assert total / len(one.token_ids) ** case.length_penalty == pytest.approx(
                one.score, abs=2e-3
            )
            assert all(len(top) <= 2 for top in choice.logprobs.top_logprobs)


def test_several_prompts_and_a_search_of_one_beam(client, searched):
    case = next(iter(searched))
    prompts = [PROMPTS[case.prompt], PROMPTS[1]]
    answer = ask(client, case, prompt=prompts, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].token_ids == searched[case][0].token_ids
    greedy = client.completions.create(
        model="base",
        prompt=PROMPTS[0],
        max_tokens=9,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    single = ask(client, Case(0, 1, 2.0, None), max_tokens=9)
    assert single.choices[0].text == greedy.choices[0].text


def test_the_best_of_several_are_those_of_the_highest_log_probability_per_token(client):
    fields = {"model": "base", "prompt": [PROMPTS[0], PROMPTS[1]], "max_tokens": 6, "logprobs": 0}
    everything = client.completions.create(**fields, n=5, seed=3)
    best = client.completions.create(**fields, n=2, best_of=5, seed=3)

    def mean(choice) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    for prompt in range(2):
        found = sorted(everything.choices[5 * prompt : 5 * prompt + 5], key=mean, reverse=True)[:2]
        answered = best.choices[2 * prompt : 2 * prompt + 2]
        assert [each.text for each in answered] == [each.text for each in found]
    assert [choice.index for choice in best.choices] == [0, 1, 2, 3]
    assert best.usage.completion_tokens == everything.usage.completion_tokens


BAD = [
    ({"beam_width": 2}, "beam_width"),
    ({"length_penalty": 0.5}, "length_penalty"),
    ({"use_beam_search": True, "beam_width": 65}, "beam_width"),
    ({"use_beam_search": True, "beam_width": 2, "n": 3}, "beam_width"),
    ({"use_beam_search": True, "beam_width": 2, "stream": True}, "stream"),
    ({"use_beam_search": True, "beam_width": 2, "echo": True}, "echo"),
    ({"use_beam_search": True, "beam_width": 2, "temperature": 0.5}, "temperature"),
    ({"use_beam_search": True, "beam_width": 2, "top_p": 0.5}, "top_p"),
    ({"use_beam_search": True, "beam_width": 2, "min_tokens": 1}, "min_tokens"),
    ({"use_beam_search": True, "beam_width": 2, "stop": "x"}, "stop"),
    ({"use_beam_search": True, "beam_width": 2, "logit_bias": {"5": 1}}, "logit_bias"),
    ({"use_beam_search": True, "beam_width": 2, "best_of": 2}, "best_of"),
    ({"use_beam_search": True, "beam_width": 2, "guided_regex": "x"}, "guided_regex"),
    ({"use_beam_search": True, "beam_width": 2, "length_penalty": 1e9}, "length_penalty"),
    ({"n": 2, "best_of": 1}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"),
]


@pytest.mark.parametrize(("fields", "param"), BAD)
def test_what_does_not_go_together_is_refused(client, fields, param):
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="base", prompt="x", extra_body=fields)
    assert refused.value.param == param
