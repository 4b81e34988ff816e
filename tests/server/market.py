"""A scheduler, tenants that ask for something, and a machine whose time is a formula."""

from collections import Counter
from dataclasses import dataclass, field

from deltamux.server.generation import (
    GenerationRequest,
    SamplingParams,
    Share,
    TokenLogprobs,
)
from deltamux.server.scheduler.block_manager import BlockManager
from deltamux.server.scheduler.limits import SchedulerLimits
from deltamux.server.scheduler.plan import SequenceResult
from deltamux.server.scheduler.scheduler import Scheduler
from deltamux.server.scheduler.sequence import AdapterUse, Salt, Sequence

from .counted_slots import CountedSlots

VOCAB = 1000


@dataclass
class Told:
    """One request, and when what came of it."""

    sequence: Sequence
    asked: float
    tokens: list[float] = field(default_factory=list)
    ended: bool = False

    @property
    def ttft(self):
        return self.tokens[0] - self.asked

    @property
    def gaps(self):
        return [later - before for before, later in zip(self.tokens, self.tokens[1:], strict=False)]


class Market:
    """Steps a scheduler; a step of r rows takes ``overhead + r``, over the machine's speed."""

    def __init__(
        self,
        seqs=8,
        budget=64,
        blocks=400,
        block_size=4,
        slots=1000,
        overhead=32,
        speed=1.0,
        check=True,
    ):
        limits = SchedulerLimits(seqs, budget, 4000, VOCAB, step_overhead=overhead)
        self.blocks = BlockManager(blocks, block_size)
        self.slots = CountedSlots(slots)
        self.scheduler = Scheduler(limits, self.blocks, self.slots)
        self.speed = speed
        self.check = self.scheduler.check_integrity if check else lambda: None
        self.now = 0.0
        self.told = {}
        self.service = Counter()
        self.computed = Counter()

    def ask(self, tenant, prompt, output, *, weight=1.0, adapter=None, beams=None, **request):
        name = f"{tenant}-{len(self.told)}"
        asked = GenerationRequest(
            request_id=name,
            prompt_token_ids=[len(self.told) % VOCAB] * prompt,
            sampling=SamplingParams(max_tokens=output, seed=0, beams=beams),
            share=Share(tenant, weight),
            **request,
        )
        use = AdapterUse(
            adapter_ids=() if adapter is None else (adapter,), salts=(Salt(0, name.encode()),)
        )
        sequence = Sequence(asked, use, len(self.told))
        self.scheduler.add(sequence)
        self.told[name] = Told(sequence, self.now)
        return self.told[name]

    def waiting(self, tenant):
        return sum(each.tenant == tenant for each in self.scheduler._waiting)

    def running(self, tenant):
        return sum(each.tenant == tenant for each in self.scheduler._running.values())

    def step(self):
        """One step; the requests in it."""
        plan = self.scheduler.schedule()
        self.check()
        assert plan.scheduled
        self.now += (self.scheduler.limits.step_overhead + plan.num_tokens) / self.speed
        for item in plan.scheduled:
            self._count(item)
        results = [self._result(item) for item in plan.scheduled]
        for update in self.scheduler.commit(plan, results):
            told = self.told[update.request_id]
            told.tokens += [self.now] * len(update.token_ids)
            told.ended = update.finish_reason is not None
        self.check()
        return {item.sequence.request.request_id for item in plan.scheduled}

    @staticmethod
    def _result(item):
        if not item.samples:
            return SequenceResult(None)
        ranked = TokenLogprobs(7, -0.1, 1, [(token, -0.1 * token) for token in range(1, 9)])
        return SequenceResult(7, None if item.sequence.group is None else ranked)

    def _count(self, item):
        """Service as the paper defines it, of what is computed for the first time."""
        sequence = item.sequence
        for position in range(max(item.start, self.computed[sequence]), item.end):
            self.service[sequence.tenant] += 1 if position < sequence.prompt_len else 2
        self.computed[sequence] = max(self.computed[sequence], item.end)
