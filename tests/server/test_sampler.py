"""The sampler against transformers' logits processors and against statistics."""

import math

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from deltamux.server.generation import GenerationRequest, SamplingParams
from deltamux.server.runner.filters import filter_probs, invert, uniforms
from deltamux.server.runner.reports import report_logprobs
from deltamux.server.runner.sampler import edit_logits, sample
from deltamux.server.scheduler.sequence import Sequence

VOCAB = 5003


def make_sequence(prompt=(1, 2, 3), output=(), **params) -> Sequence:
    sampling = SamplingParams(**{"max_tokens": 100, "seed": 7, **params})
    request = GenerationRequest(
        request_id="r",
        prompt_token_ids=list(prompt),
        sampling=sampling,
        output_token_ids=list(output),
    )
    return Sequence(request, b"", 0)


def random_logits(rows: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


@pytest.mark.parametrize("spread", [0.05, 3.0])
@pytest.mark.parametrize(
    ("params", "warpers"),
    [
        ({"top_k": 5}, [TopKLogitsWarper(5)]),
        ({"top_k": VOCAB}, []),
        ({"top_p": 0.3}, [TopPLogitsWarper(0.3)]),
        ({"top_p": 0.97}, [TopPLogitsWarper(0.97)]),
        ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
        ({"top_k": 50, "top_p": 0.8}, [TopKLogitsWarper(50), TopPLogitsWarper(0.8)]),
        (
            {"min_p": 0.1, "top_k": 40, "top_p": 0.9},
            [MinPLogitsWarper(0.1), TopKLogitsWarper(40), TopPLogitsWarper(0.9)],
        ),
    ],
)
def test_filters_keep_what_transformers_keeps(params, warpers, spread):
    logits = random_logits(1, spread=spread)
    # Neighbours with other parameters must not change the row.
    batch = torch.cat([random_logits(1, 1), logits, random_logits(1, 2)])
    rows = [{"top_k": 3, "top_p": 0.5}, params, {}]
    kept = filter_probs(batch.softmax(-1), [make_sequence(**row).sampling for row in rows])[1] > 0

    expected = logits
    for warper in warpers:
        expected = warper(torch.tensor([[1]]), expected)
    assert torch.equal(kept, expected[0].isfinite())


def test_repetition_penalty_is_that_of_transformers():
    logits = random_logits(1)
    sequence = make_sequence(prompt=(5, 9, 5), output=(11, 9), repetition_penalty=1.7)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(
        torch.tensor([sequence.token_ids]), logits.clone()
    )
    edit_logits(logits, [sequence])
    torch.testing.assert_close(logits, expected)


def test_presence_and_frequency_count_the_output_alone():
    logits = torch.zeros(1, VOCAB)
    sequence = make_sequence(
        prompt=(5,), output=(8, 8, 6), presence_penalty=0.5, frequency_penalty=0.25
    )
    edit_logits(logits, [sequence])
    assert logits[0, [5, 6, 8]].tolist() == [0.0, -0.75, -1.0]
    assert logits[0].count_nonzero() == 2


def test_logit_bias_and_min_tokens_touch_their_tokens_alone():
    logits = torch.zeros(2, VOCAB)
    edited = make_sequence(
        logit_bias={4: 2.0, 9: -100.0}, min_tokens=1, end_token_ids=(0,), stop_token_ids=(7,)
    )
    edit_logits(logits, [edited, make_sequence()])
    assert logits[0, [4, 9, 0, 7]].tolist() == [2.0, -100.0, -math.inf, -math.inf]
    assert logits[0].count_nonzero() == 4
    assert not logits[1].any()


def test_end_tokens_are_free_once_min_tokens_are_there():
    logits = torch.zeros(1, VOCAB)
    edit_logits(logits, [make_sequence(output=(3,), min_tokens=1, end_token_ids=(0,))])
    assert not logits.any()


def test_greedy_takes_the_largest_logit():
    logits = random_logits(3)
    expected = logits.argmax(-1).tolist()
    rows = [{"temperature": 0.0}, {"top_k": 1}, {"temperature": 1e-46}]
    choices = sample(logits, [make_sequence(**row) for row in rows])
    assert [choice.token_id for choice in choices] == expected


def test_the_draw_does_not_depend_on_neighbours():
    logits = random_logits(8)
    rows = [make_sequence(seed=seed, top_p=0.9 if seed % 2 else 1.0) for seed in range(8)]
    together = [choice.token_id for choice in sample(logits.clone(), rows)]
    alone = [sample(logits[i : i + 1].clone(), rows[i : i + 1])[0].token_id for i in range(8)]
    assert together == alone
    backwards = [choice.token_id for choice in sample(logits.flip(0).clone(), rows[::-1])]
    assert backwards[::-1] == alone


@pytest.mark.parametrize("vocab", [1, 5, 255, 256, 257, 5003])
def test_draws_invert_the_cumulative_distribution(vocab):
    probs = torch.rand(200, vocab, generator=torch.Generator().manual_seed(0))
    probs[probs < 0.5] = 0
    probs[:, vocab // 2] += 0.1
    numbers = torch.linspace(0, 1 - 2**-53, 200, dtype=torch.float64)
    cumulative = probs.double().cumsum(-1)
    for row, chosen in enumerate(invert(probs, numbers).tolist()):
        assert probs[row, chosen] > 0
        target = float(numbers[row] * cumulative[row, -1])
        assert cumulative[row, chosen] >= target - 1e-9
        assert cumulative[row, chosen] - probs[row, chosen] <= target + 1e-9


def test_bias_comes_before_penalties():
    logits = torch.zeros(1, VOCAB)
    sequence = make_sequence(prompt=(5,), logit_bias={5: 3.0}, repetition_penalty=2.0)
    edit_logits(logits, [sequence])
    assert logits[0, 5] == 1.5


def test_a_row_whose_every_token_is_masked_fails():
    ends = tuple(range(VOCAB))
    sequence = make_sequence(min_tokens=1, end_token_ids=ends)
    (choice,) = sample(random_logits(1), [sequence])
    assert choice.token_id is None


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    draws = 20_000
    sequences = [make_sequence(seed=seed, temperature=0.8) for seed in range(draws)]
    chosen = [choice.token_id for choice in sample(logits.repeat(draws, 1), sequences)]
    observed = torch.bincount(torch.tensor(chosen), minlength=4).double()
    expected = (logits[0].double() / 0.8).softmax(-1) * draws
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    assert chi_square < 16.3  # 99.9th percentile at 3 degrees of freedom


def test_uniforms_are_spread_over_seeds_and_indices():
    by_seed = uniforms(range(10_000), [3] * 10_000)
    by_index = uniforms([12345] * 10_000, range(10_000))
    for numbers in (by_seed, by_index):
        assert numbers.min() >= 0
        assert numbers.max() < 1
        assert abs(numbers.mean() - 0.5) < 0.015
        assert len(set(numbers.tolist())) == 10_000
    assert uniforms([-1], [0]) == uniforms([2**64 - 1], [0])


def test_logprobs_are_of_the_raw_distribution():
    logits = random_logits(2)
    raw = logits.clone()
    sequences = [
        make_sequence(temperature=0.0, logit_bias={17: 100.0}, logprobs=3),
        make_sequence(temperature=0.0),
    ]
    biased, plain = sample(logits, sequences)
    assert plain.logprobs is None
    assert biased.token_id == 17
    report = biased.logprobs
    expected = raw[0].log_softmax(-1)
    assert report.logprob == pytest.approx(float(expected[17]), abs=1e-5)
    assert report.rank == int((expected > expected[17]).sum()) + 1
    values, ids = expected.topk(3)
    assert [token for token, _ in report.top] == ids.tolist()
    assert [value for _, value in report.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_logprobs_of_zero_alternatives_report_the_choice_alone():
    (report,) = report_logprobs(random_logits(1), [42], 0)
    assert (report.token_id, report.top) == (42, [])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_fails_alone(bad):
    logits = random_logits(3)
    expected = logits.argmax(-1).tolist()
    logits[1, 77] = bad
    sequences = [make_sequence(temperature=t) for t in (0.0, 1.0, 0.0)]
    first, broken, last = sample(logits, sequences)
    assert (first.token_id, last.token_id) == (expected[0], expected[2])
    assert broken.token_id is None
    assert "not finite" in broken.error
