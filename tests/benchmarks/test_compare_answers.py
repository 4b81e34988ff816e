"""The check of answers, on a tiny base: it must see an adapter that is not the one asked for."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from deltamux.benchmarks.client import Request, random_prompt
from deltamux.benchmarks.compare.answers import Finding, check
from deltamux.benchmarks.compare.environment import Environments
from deltamux.benchmarks.compare.material import Material, make_material
from deltamux.benchmarks.compare.peers.judge import Judge
from deltamux.benchmarks.compare.peers.peer import Setup
from deltamux.benchmarks.compare.scenarios import BASE, Size

from ..server.peft_oracle import Oracle

TOKENS = range(3, 300)
SIZE = Size(4, 12, 16, 1, 60.0, TOKENS, seed=0)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Setup:
    folder = tmp_path_factory.mktemp("compare")
    material = make_material(str(tiny_model("llama")), folder, 4, seed=0)
    environments = Environments(folder, "torch==2.13.0", print)
    return Setup(material, SIZE, threads=1, logs=folder / "logs", environments=environments)


@pytest.fixture(scope="module")
def judge(setup: Setup) -> Iterator[Judge]:
    judge = Judge(setup)
    yield judge
    judge.end()


@pytest.fixture(scope="module")
def oracle(setup: Setup) -> Oracle:
    """In bfloat16, as the systems under comparison are."""
    return Oracle(setup.material.base, torch.bfloat16)


def requests(models: Sequence[str]) -> list[Request]:
    return [
        Request(model, random_prompt(f"{index}", SIZE.prompt_tokens, TOKENS), SIZE.output_tokens)
        for index, model in enumerate(models)
    ]


def judged(
    judge: Judge, oracle: Oracle, material: Material, models: Sequence[str], served: Sequence[str]
) -> Finding:
    """The finding about a system that answers requests for ``models`` as ``served``."""
    asked = requests(models)
    answers = [
        oracle.generate(
            list(request.prompt), request.output_tokens, material.adapters.get(model)
        ).token_ids
        for request, model in zip(asked, served, strict=True)
    ]
    return check(judge, asked, answers, [BASE, *material.adapters])


MIXED = [BASE, "lora-00", BASE, "lora-01", "lora-02", "lora-03", "lora-00", BASE]


def test_right_answers_in_bfloat16_pass(setup: Setup, judge: Judge, oracle: Oracle) -> None:
    finding = judged(judge, oracle, setup.material, MIXED, MIXED)
    assert finding.fault is None
    assert finding.mean_gap is not None
    assert finding.mean_gap < 0.02


@pytest.mark.parametrize(
    ("row", "served", "said"),
    [
        (1, BASE, "request 1, for lora-00, was answered as base"),
        (3, "lora-00", "request 3, for lora-01, was answered as lora-00"),
        (2, "lora-03", "request 2, for base, was answered as lora-03"),
    ],
    ids=["the base for an adapter", "a neighbour's adapter", "an adapter for the base"],
)
def test_one_wrong_row_is_found_and_named(
    setup: Setup, judge: Judge, oracle: Oracle, row: int, served: str, said: str
) -> None:
    planted = [*MIXED[:row], served, *MIXED[row + 1 :]]
    finding = judged(judge, oracle, setup.material, MIXED, planted)
    assert finding.fault is not None
    assert said in finding.fault
    assert finding.fault.startswith("1 of 8 answers")


def test_the_first_adapter_for_the_whole_batch_is_found(
    setup: Setup, judge: Judge, oracle: Oracle
) -> None:
    models = list(setup.material.adapters)
    finding = judged(judge, oracle, setup.material, models, [models[0]] * len(models))
    assert finding.fault is not None
    assert "3 of 4 answers" in finding.fault
    assert "was answered as lora-00" in finding.fault


def test_tokens_that_no_model_says_are_found(setup: Setup, judge: Judge) -> None:
    asked = requests([BASE])
    answer = random_prompt("noise", SIZE.output_tokens, TOKENS)
    finding = check(judge, asked, [answer], [BASE, *setup.material.adapters])
    assert finding.fault is not None
    assert "was answered as no model here" in finding.fault


def test_a_short_answer_is_a_fault(setup: Setup, judge: Judge) -> None:
    finding = check(judge, requests([BASE]), [[5, 6, 7]], [BASE])
    assert finding.fault == "request 0: 3 tokens instead of 16"


class Scripted:
    """A reference that says what it is told to, by model."""

    def __init__(self, **gaps: float) -> None:
        self._gaps = gaps

    def gaps(self, rows: Sequence[tuple[str, Request, list[int]]]) -> list[list[float]]:
        return [[self._gaps[model.replace("-", "_")]] * len(answer) for model, _, answer in rows]


@pytest.mark.parametrize(
    ("gaps", "said"),
    [
        ({"base": 0.3, "lora_00": 0.0, "lora_01": 0.4}, None),
        ({"base": 0.02, "lora_00": 0.0, "lora_01": 0.4}, "whose 4 of 4 answers are cannot be told"),
        ({"base": 0.9, "lora_00": 0.1, "lora_01": 0.9}, "0.100 nats less likely than the best"),
        ({"base": 0.0, "lora_00": 0.3, "lora_01": 0.9}, "was answered as base"),
    ],
    ids=["right", "alike", "imprecise", "the base"],
)
def test_the_verdict(gaps: dict[str, float], said: str | None) -> None:
    asked = requests(["lora-00"] * 4)
    answers = [[5] * SIZE.output_tokens] * 4
    fault = check(Scripted(**gaps), asked, answers, [BASE, "lora-00", "lora-01"]).fault
    assert (fault is None) if said is None else (fault is not None and said in fault)
