"""Each rule of the scheduler by itself. Random traces with all of them are in the traces test."""

import subprocess
import sys

import pytest

from deltamux.server.generation import (
    FinishReason,
    GenerationRequest,
    SamplingParams,
    TokenLogprobs,
)
from deltamux.server.scheduler.block_manager import BlockManager
from deltamux.server.scheduler.errors import AccountingError, SequenceRefused, SequenceTooLong
from deltamux.server.scheduler.limits import SchedulerLimits
from deltamux.server.scheduler.plan import SequenceResult
from deltamux.server.scheduler.scheduler import Scheduler
from deltamux.server.scheduler.sequence import AdapterUse, Prefix, Salt, Sequence

from .counted_slots import CountedSlots

END = 999
VOCAB = 1000


class Bench:
    """A scheduler, and a runner that answers ``token`` everywhere."""

    def __init__(self, seqs=8, budget=64, length=1000, blocks=100, block_size=4, room=8, **limits):
        self.slots = CountedSlots(room)
        self.blocks = BlockManager(blocks, block_size)
        self.scheduler = Scheduler(
            SchedulerLimits(seqs, budget, length, VOCAB, **limits), self.blocks, self.slots
        )
        self.arrivals = 0

    def add(
        self,
        name,
        prompt,
        *,
        adapter=None,
        priority=0,
        output=(),
        max_tokens=50,
        salt=None,
        prefix=None,
        end_token_ids=(END,),
        **sampling,
    ):
        request = GenerationRequest(
            request_id=name,
            prompt_token_ids=list(range(prompt)) if isinstance(prompt, int) else list(prompt),
            sampling=SamplingParams(
                max_tokens=max_tokens, seed=0, end_token_ids=tuple(end_token_ids), **sampling
            ),
            priority=priority,
            output_token_ids=list(output),
        )
        self.arrivals += 1
        use = AdapterUse(
            adapter_ids=() if adapter is None else (adapter,),
            prefix=prefix,
            salts=(Salt(0, (salt or name).encode()),),
        )
        sequence = Sequence(request, use, self.arrivals)
        self.scheduler.add(sequence)
        return sequence

    def step(self, token=7):
        """Plan and run one step: {request: (start, end)} and {request: update}."""
        plan = self.scheduler.schedule()
        self.scheduler.check_integrity()
        results = [SequenceResult(token if item.samples else None) for item in plan.scheduled]
        updates = self.scheduler.commit(plan, results)
        self.scheduler.check_integrity()
        ran = {i.sequence.request.request_id: (i.start, i.end) for i in plan.scheduled}
        return ran, {update.request_id: update for update in updates}

    def finish(self, token=7):
        """Step until nothing is left to do; the updates by request."""
        updates = {}
        for _ in range(200):
            if not self.scheduler.has_work:
                return updates
            for name, update in self.step(token)[1].items():
                updates.setdefault(name, []).append(update)
        raise AssertionError("the scheduler does not come to an end")


def test_importing_the_scheduler_does_not_import_torch():
    code = (
        "import sys, deltamux.server.scheduler.scheduler;"
        " sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((0, 8, 8, 9), "max_num_seqs must be at least 1, not 0"),
        ((9, 8, 8, 9), r"max_num_batched_tokens \(8\) must be at least max_num_seqs \(9\)"),
        ((8, 8, 1, 9), "max_model_len must be at least 2"),
        ((8, 8, 8, 0), "vocab_size must be at least 1, not 0"),
        ((8, 8, 8, 9, -1), "max_overtakes must not be negative"),
    ],
)
def test_limits_that_would_starve_are_refused(bounds, message):
    with pytest.raises(ValueError, match=message):
        SchedulerLimits(*bounds)


def test_one_request_from_prompt_to_length():
    bench = Bench()
    bench.add("a", 6, max_tokens=3)
    assert bench.scheduler.num_waiting == 1
    ran, updates = bench.step(10)
    assert ran == {"a": (0, 6)}
    assert updates["a"].token_ids == [10]
    assert updates["a"].finish_reason is None
    assert bench.scheduler.num_running == 1
    assert bench.step(11)[0] == {"a": (6, 7)}
    ran, updates = bench.step(12)
    assert ran == {"a": (7, 8)}
    assert (updates["a"].token_ids, updates["a"].finish_reason) == ([12], FinishReason.LENGTH)
    assert not bench.scheduler.has_work
    assert bench.blocks.num_used == 0


def test_prompts_longer_than_the_budget_are_chunked_and_sample_once():
    bench = Bench(seqs=4, budget=5)
    bench.add("a", 12)
    assert bench.step() == ({"a": (0, 5)}, {})
    assert bench.step() == ({"a": (5, 10)}, {})
    ran, updates = bench.step()
    assert ran == {"a": (10, 12)}
    assert updates["a"].token_ids == [7]


def test_decode_rows_come_before_prefill_chunks():
    bench = Bench(seqs=4, budget=6)
    bench.add("a", 3)
    bench.add("b", 12)
    bench.add("c", 2)
    assert bench.step()[0] == {"a": (0, 3), "b": (0, 3)}
    ran, _ = bench.step()
    assert list(ran.items()) == [("a", (3, 4)), ("b", (3, 8))]
    assert bench.step()[0] == {"a": (4, 5), "b": (8, 12), "c": (0, 1)}
    ran, _ = bench.step()
    assert list(ran.items()) == [("a", (5, 6)), ("b", (12, 13)), ("c", (1, 2))]


def test_every_decode_row_runs_when_the_budget_is_as_small_as_allowed():
    bench = Bench(seqs=3, budget=3)
    for name in "abc":
        bench.add(name, 2)
    steps = [bench.step()[0] for _ in range(6)]
    assert steps[:2] == [{"a": (0, 2), "b": (0, 1)}, {"a": (2, 3), "b": (1, 2), "c": (0, 1)}]
    assert all(set(ran) == {"a", "b", "c"} for ran in steps[2:])


def test_max_num_seqs_bounds_the_running_ones():
    bench = Bench(seqs=2)
    for name in "abc":
        bench.add(name, 2, max_tokens=2)
    assert set(bench.step()[0]) == {"a", "b"}
    assert set(bench.step()[0]) == {"a", "b"}
    assert set(bench.step()[0]) == {"c"}


def test_waiting_order_is_priority_then_arrival():
    bench = Bench(seqs=1)
    bench.add("late", 2, priority=1, max_tokens=1)
    bench.add("first", 2, max_tokens=1)
    bench.add("second", 2, max_tokens=1)
    bench.add("urgent", 2, priority=-1, max_tokens=1)
    order = [next(iter(bench.step()[0])) for _ in range(4)]
    assert order == ["urgent", "first", "second", "late"]


@pytest.mark.parametrize("where", ["end_token_ids", "stop_token_ids"])
def test_end_and_stop_tokens_stop(where):
    bench = Bench()
    bench.add("a", 2, **({"stop_token_ids": (55,)} if where == "stop_token_ids" else {}))
    token = 55 if where == "stop_token_ids" else END
    update = bench.step(token)[1]["a"]
    assert update.token_ids == [token]
    assert (update.finish_reason, update.stop_token_id) == (FinishReason.STOP, token)


def test_an_end_token_counts_only_after_min_tokens():
    bench = Bench()
    bench.add("a", 2, min_tokens=2)
    reasons = [bench.step(END)[1]["a"].finish_reason for _ in range(3)]
    assert reasons == [None, None, FinishReason.STOP]


def test_stop_wins_over_length():
    bench = Bench()
    bench.add("a", 2, max_tokens=1)
    assert bench.step(END)[1]["a"].finish_reason is FinishReason.STOP


@pytest.mark.parametrize(("length", "blocks"), [(10, 100), (1000, 3)])
def test_the_models_or_the_caches_length_ends_with_length(length, blocks):
    bench = Bench(length=length, blocks=blocks)
    limit = min(length, blocks * 4)
    sequence = bench.add("a", 6)
    assert bench.scheduler.max_tokens_that_fit(sequence) == limit
    assert bench.finish()["a"][-1].finish_reason is FinishReason.LENGTH
    assert len(sequence.token_ids) == limit
    assert bench.scheduler.num_preemptions == 0


@pytest.mark.parametrize(("length", "blocks"), [(10, 100), (1000, 3)])
def test_too_long_a_sequence_is_refused(length, blocks):
    bench = Bench(length=length, blocks=blocks)
    limit = min(length, blocks * 4)
    with pytest.raises(SequenceTooLong, match=f"has {limit} tokens.*at most {limit} tokens"):
        bench.add("a", limit)
    with pytest.raises(SequenceTooLong):
        bench.add("a", limit - 1, output=[1])
    assert not bench.scheduler.has_work
    bench.add("a", limit - 1)


def test_what_cannot_run_is_refused_by_name():
    bench = Bench()
    bench.add("a", 2)
    with pytest.raises(SequenceRefused, match="id a is running already"):
        bench.add("a", 2)
    with pytest.raises(SequenceRefused, match="prompt is empty"):
        bench.add("b", 0)
    with pytest.raises(SequenceRefused, match="2 tokens are there and max_tokens is 2"):
        bench.add("b", 3, output=[1, 2], max_tokens=2)


@pytest.mark.parametrize("wrong", [-1, VOCAB, 2**40])
@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("prompt", "prompt or output"),
        ("output", "prompt or output"),
        ("logit_bias", "logit_bias"),
        ("stop_token_ids", "stop_token_ids"),
        ("end_token_ids", "end_token_ids"),
    ],
)
def test_tokens_that_the_model_does_not_have_are_refused(where, says, wrong):
    bench = Bench()
    asked = {"prompt": [0, VOCAB - 1], "logit_bias": {0: 1.0, VOCAB - 1: 1.0}}
    bench.add("good", stop_token_ids=(0, VOCAB - 1), **asked)
    bad = {"prompt": [1], where: {5: 1.0, wrong: 1.0} if where == "logit_bias" else [5, wrong]}
    with pytest.raises(SequenceRefused, match=f"{says}: there is no token {wrong}.*0 to 999"):
        bench.add("bad", **bad)
    assert bench.scheduler.num_waiting == 1


def test_a_resumed_request_continues_its_output():
    bench = Bench()
    sequence = bench.add("a", 3, output=[10, 11], max_tokens=4)
    assert sequence.num_output_tokens == 2
    ran, updates = bench.step(12)
    assert ran == {"a": (0, 5)}
    assert updates["a"].token_ids == [12]
    assert bench.step(13)[1]["a"].finish_reason is FinishReason.LENGTH
    assert sequence.token_ids == [0, 1, 2, 10, 11, 12, 13]


def test_an_error_ends_its_sequence_alone_and_leaves_nothing_findable():
    bench = Bench()
    bad = bench.add("bad", 8, adapter=1)
    bench.add("good", 8)
    bench.step()
    assert len(bench.blocks.find_cached(bad, 8)) == 2
    plan = bench.scheduler.schedule()
    results = [SequenceResult(None, error="not finite"), SequenceResult(5)]
    updates = bench.scheduler.commit(plan, results)
    assert (updates[0].finish_reason, updates[0].error) == (FinishReason.ERROR, "not finite")
    assert updates[0].token_ids == []
    assert updates[1].finish_reason is None
    assert bench.blocks.find_cached(bad, 8) == []
    assert not bench.slots.held
    assert bench.scheduler.num_running == 1


@pytest.mark.parametrize("token", [None, 5])
def test_a_result_that_does_not_fit_its_plan_is_a_defect(token):
    bench = Bench(seqs=1, budget=4)
    bench.add("a", 3 if token is None else 9)
    with pytest.raises(ValueError, match="a: samples is"):
        bench.scheduler.commit(bench.scheduler.schedule(), [SequenceResult(token)])


def test_results_must_match_the_plan_in_number():
    bench = Bench()
    bench.add("a", 3)
    with pytest.raises(ValueError, match="zip"):
        bench.scheduler.commit(bench.scheduler.schedule(), [])


def test_abort_ends_waiting_and_running_sequences_once():
    bench = Bench(seqs=1)
    bench.add("running", 4, adapter=1)
    bench.add("waiting", 4, adapter=1)
    bench.step()
    for name in ("waiting", "running"):
        assert bench.scheduler.abort(name)
        assert not bench.scheduler.abort(name)
        bench.scheduler.check_integrity()
    assert not bench.scheduler.abort("never seen")
    assert not bench.scheduler.has_work
    assert (bench.blocks.num_used, bench.slots.held) == (0, {})


def test_commit_passes_over_sequences_that_were_aborted_meanwhile():
    bench = Bench()
    gone = bench.add("a", 4)
    bench.add("b", 4)
    plan = bench.scheduler.schedule()
    bench.scheduler.abort("a")
    again = bench.add("a", 4)
    updates = bench.scheduler.commit(plan, [SequenceResult(1), SequenceResult(2)])
    assert [update.request_id for update in updates] == ["b"]
    assert len(gone.token_ids) == len(again.token_ids) == 4
    bench.scheduler.check_integrity()


def test_running_out_of_blocks_preempts_the_least_urgent_and_recomputes_it():
    bench = Bench(blocks=5)
    late = bench.add("late", range(50, 57), max_tokens=6)
    bench.add("urgent", 7, priority=-1, max_tokens=9)
    bench.step(10)
    bench.step(11)
    assert late.num_output_tokens == 2
    ran, _ = bench.step(12)  # one block is left, and both need a third
    assert ran == {"urgent": (8, 9)}
    assert bench.scheduler.num_preemptions == late.num_preemptions == 1
    assert (bench.scheduler.num_running, bench.scheduler.num_waiting) == (1, 1)
    assert late.token_ids[7:] == [10, 11]
    updates = bench.finish(20)["late"]
    assert [token for update in updates for token in update.token_ids] == [20, 20, 20, 20]
    assert late.token_ids[7:] == [10, 11, 20, 20, 20, 20]


def test_preemption_frees_the_adapter_and_keeps_the_place_in_the_queue():
    bench = Bench(blocks=5, room=2)
    bench.add("a", range(7), max_tokens=6)
    bench.add("b", range(50, 57), adapter=1)
    bench.step()
    bench.add("c", 9)
    bench.step()
    bench.add("d", 2, priority=-1)
    assert bench.slots.held == {1: 1}
    ran, _ = bench.step()
    assert "b" not in ran
    assert not bench.slots.held
    assert [each.request.request_id for each in bench.scheduler._waiting] == ["d", "b", "c"]


def test_a_preempted_sequence_takes_what_is_left_of_its_prefix_from_the_cache():
    bench = Bench(blocks=6)
    bench.add("a", range(7), max_tokens=4)
    late = bench.add("b", range(50, 61))
    bench.step()
    bench.step()
    assert set(bench.step()[0]) == {"a"}
    assert late.num_preemptions == 1
    assert bench.step()[1]["a"].finish_reason is FinishReason.LENGTH
    assert bench.step()[0] == {"b": (12, 13)}
    assert late.num_cached_tokens == 0  # counts the first admission alone
    assert (bench.blocks.prefix_queries, bench.blocks.prefix_hits) == (18, 0)


def test_admission_keeps_a_spare_block_for_every_running_sequence():
    bench = Bench(blocks=4)
    bench.add("a", 2, max_tokens=3)
    bench.step()
    bench.add("b", range(50, 60))  # three blocks are free, and it needs three
    assert set(bench.step()[0]) == {"a"}
    assert set(bench.step()[0]) == {"a"}
    assert set(bench.step()[0]) == {"b"}


def test_nothing_passes_a_head_that_waits_for_blocks():
    bench = Bench(blocks=5)
    bench.add("a", 8, max_tokens=3)
    bench.step()
    bench.add("long", range(50, 66))
    bench.add("short", 1)
    assert set(bench.step()[0]) == {"a"}
    assert set(bench.step()[0]) == {"a"}
    assert "long" in bench.step()[0]


def test_a_head_that_waits_for_an_adapter_slot_is_passed_a_bounded_number_of_times():
    bench = Bench(seqs=3, room=1, max_overtakes=4)
    bench.add("holder", 2, adapter=1, max_tokens=40)
    bench.step()
    bench.add("head", 2, adapter=2)
    overtakers = 0
    for number in range(30):
        bench.add(f"n{number}", 2, adapter=None if number % 2 else 1, max_tokens=1)
        ran, _ = bench.step()
        assert "head" not in ran
        overtakers += f"n{number}" in ran
    assert overtakers == 4
    assert "holder" in bench.finish()
    assert not bench.slots.held


def test_steps_in_which_nothing_passes_do_not_count_as_overtaking():
    bench = Bench(room=1, max_overtakes=1)
    bench.add("holder", 2, adapter=1)
    bench.step()
    head = bench.add("head", 2, adapter=2)
    for _ in range(5):
        bench.step()
    assert head.num_overtaken == 0
    bench.add("base", 2)
    assert "base" in bench.step()[0]
    assert head.num_overtaken == 1
    bench.scheduler.abort("holder")
    bench.slots.room = 2
    assert "head" in bench.step()[0]
    assert head.num_overtaken == 0  # a later wait counts anew


def test_an_adapter_that_never_fits_ends_its_sequence_with_an_error():
    bench = Bench(room=0)
    bench.add("a", 2, adapter=1)
    bench.add("base", 2, max_tokens=2)
    assert set(bench.step()[0]) == {"base"}
    [update] = bench.finish()["a"]
    assert update.finish_reason is FinishReason.ERROR
    assert "no room on the device" in update.error
    assert not bench.scheduler.abort("a")


def test_a_refused_adapter_is_asked_for_again_only_after_a_release():
    bench = Bench(room=1)
    bench.add("holder", 2, adapter=1, max_tokens=10)
    bench.step()
    for name in "abc":
        bench.add(name, 2, adapter=2, max_tokens=1)
    for _ in range(5):
        bench.step()
    assert bench.slots.asked[2] == 1
    bench.add("short", 2, adapter=1, max_tokens=1)
    assert set(bench.step()[0]) == {"holder", "short"}
    bench.step()
    assert bench.slots.asked[2] == 2
    bench.scheduler.abort("holder")
    assert set(bench.step()[0]) == {"a", "b", "c"}


def test_choices_of_one_prompt_share_its_prefill():
    bench = Bench()
    choices = [bench.add(f"choice {i}", 10, salt="s", adapter=1) for i in range(3)]
    bench.add("other adapter", 10, salt="t")
    ran, _ = bench.step()
    assert ran == {
        "choice 0": (0, 10),
        "choice 1": (8, 10),
        "choice 2": (8, 10),
        "other adapter": (0, 10),
    }
    assert len({tuple(choice.block_table[:2]) for choice in choices}) == 1
    assert len({choice.block_table[2] for choice in choices}) == 3
    assert [choice.num_cached_tokens for choice in choices] == [0, 8, 8]
    bench.finish()
    assert bench.blocks.num_used == 0


def test_only_what_the_step_computes_is_shared():
    bench = Bench(seqs=4, budget=10)
    bench.add("a", range(16), salt="s")
    assert bench.step()[0] == {"a": (0, 10)}
    bench.add("b", range(16), salt="s", max_tokens=1)
    # two blocks were computed before, the two others are in this step
    assert bench.step()[0] == {"a": (10, 16), "b": (12, 16)}
    bench.add("c", range(30, 46), salt="s")
    bench.add("d", range(30, 46), salt="s")
    assert bench.step()[0] == {"a": (16, 17), "c": (0, 9)}
    assert bench.step()[0] == {"a": (17, 18), "c": (9, 16), "d": (12, 14)}


def test_a_shared_prefill_that_fails_leaves_nothing_findable():
    bench = Bench()
    bad = bench.add("bad", 10, salt="s")
    good = bench.add("good", 10, salt="s")
    plan = bench.scheduler.schedule()
    bench.scheduler.commit(plan, [SequenceResult(None, error="not finite"), SequenceResult(5)])
    bench.scheduler.check_integrity()
    assert bench.blocks.find_cached(bad, 10) == []
    assert bench.step()[0] == {"good": (10, 11)}
    assert len(good.block_table) == 3


def test_cached_prefixes_are_reported_and_counted():
    bench = Bench()
    first = bench.add("a", 10, max_tokens=6)
    bench.finish(30)
    follow_up = Sequence(
        GenerationRequest(
            request_id="b",
            prompt_token_ids=[*first.token_ids, 1, 2],
            sampling=SamplingParams(max_tokens=2, seed=0),
        ),
        first.adapters,
        arrival=9,
    )
    bench.scheduler.add(follow_up)
    ran, updates = bench.step()
    # 16 tokens were there, the last of which was never computed: 3 full blocks, output included
    assert ran == {"b": (12, 18)}
    assert updates["b"].num_cached_tokens == 12
    assert bench.step()[1]["b"].num_cached_tokens == 12
    assert (bench.blocks.prefix_queries, bench.blocks.prefix_hits) == (10 + 18, 12)


def test_cached_tokens_of_a_resumed_request_are_those_of_its_prompt():
    bench = Bench()
    bench.add("a", 3, output=[*range(3, 12)])
    bench.step()
    bench.scheduler.abort("a")
    again = bench.add("a", 3, output=[*range(3, 12)])
    assert bench.step()[0] == {"a": (8, 12)}
    assert again.num_cached_tokens == 3


def prompt_logprobs(item):
    last = min(item.end, item.sequence.prompt_len - 1)
    tokens = item.sequence.token_ids
    return tuple(
        TokenLogprobs(tokens[p], -float(p), 1, []) for p in range(item.start + 1, last + 1)
    )


def test_prompt_logprobs_come_in_chunks_and_do_not_read_the_cache():
    bench = Bench(seqs=1, budget=5)
    bench.add("a", 12, max_tokens=1)
    bench.finish()
    bench.add("a", 12, prompt_logprobs=0)
    got = []
    for expected in ([1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11]):
        plan = bench.scheduler.schedule()
        (item,) = plan.scheduled
        token = 3 if item.samples else None
        (update,) = bench.scheduler.commit(
            plan, [SequenceResult(token, prompt_logprobs=prompt_logprobs(item))]
        )
        assert [entry.token_id for entry in update.prompt_logprobs] == expected
        assert update.num_cached_tokens == 0
        got += update.token_ids
    assert got == [3]
    assert bench.blocks.prefix_queries == 12


def test_a_preempted_prompt_sends_each_of_its_logprobs_once():
    bench = Bench(seqs=2, budget=6, blocks=8)
    bench.add("a", 4, priority=-1, max_tokens=6)
    sequence = bench.add("b", range(50, 64), prompt_logprobs=0)
    bench.add("c", 1)
    entries = []
    for _ in range(12):
        plan = bench.scheduler.schedule()
        results = [
            SequenceResult(
                3 if item.samples else None,
                prompt_logprobs=prompt_logprobs(item) if item.sequence is sequence else (),
            )
            for item in plan.scheduled
        ]
        for update in bench.scheduler.commit(plan, results):
            entries += update.prompt_logprobs
        bench.scheduler.check_integrity()
        if sequence.num_computed_tokens in (7, 14) and sequence.num_preemptions < 2:
            bench.scheduler._preempt(sequence)
    assert sequence.num_preemptions == 2
    assert sequence.num_output_tokens > 2
    assert [entry.token_id for entry in entries] == list(range(51, 64))


def test_integrity_check_sees_lost_and_doubled_sequences():
    bench = Bench()
    sequence = bench.add("a", 4)
    bench.scheduler._running.add(sequence)
    with pytest.raises(AccountingError, match="either run or wait"):
        bench.scheduler.check_integrity()
    bench.scheduler._running.remove(sequence)
    bench.scheduler.check_integrity()
    bench.scheduler._waiting.remove(sequence)
    with pytest.raises(AccountingError, match="either run or wait"):
        bench.scheduler.check_integrity()


def test_a_prefix_takes_part_of_the_length_and_of_the_cache():
    bench = Bench(length=16, blocks=100)
    prefix = Prefix(b"p", 6, 6, (1,))
    sequence = bench.add("a", 4, adapter=1, prefix=prefix)
    assert bench.scheduler.max_tokens_that_fit(sequence) == 10
    assert bench.finish()["a"][-1].finish_reason is FinishReason.LENGTH
    assert len(sequence.token_ids) == 10
    with pytest.raises(SequenceTooLong, match="prefix of 6"):
        bench.add("long", 10, adapter=1, prefix=prefix)
    cramped = Bench(length=1000, blocks=4)
    assert cramped.scheduler.max_tokens_that_fit(sequence) == 8


def test_the_step_that_admits_a_prefix_writes_it_and_no_other_does():
    bench = Bench()
    prefix = Prefix(b"p", 6, 6, (1,))
    bench.add("a", 4, adapter=1, prefix=prefix)
    bench.add("b", 4, adapter=1, prefix=prefix)
    plan = bench.scheduler.schedule()
    [load] = plan.prefix_loads
    assert load.prefix is prefix
    assert [list(load.blocks.values())] * 2 == [i.sequence.prefix_blocks for i in plan.scheduled]
    bench.scheduler.commit(plan, [SequenceResult(7), SequenceResult(7)])
    bench.add("c", 4, adapter=1, prefix=prefix)
    assert bench.scheduler.schedule().prefix_loads == ()


def test_all_adapters_of_a_sequence_are_held_or_none():
    bench = Bench(room=1)
    request = bench.add("a", 4, adapter=1).request
    both = Sequence(
        GenerationRequest(
            request_id="both",
            prompt_token_ids=request.prompt_token_ids,
            sampling=request.sampling,
        ),
        AdapterUse(adapter_ids=(1, 2)),
        arrival=9,
    )
    bench.scheduler.add(both)
    assert list(bench.step()[0]) == ["a"]
    assert bench.slots.held == {1: 1}
