"""Many shots at one server, and its books before, meanwhile and after."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx

from .shots import shot
from .wire import Judge, Target, fire

CONNECTIONS = 16


@dataclass(slots=True)
class Findings:
    """What a campaign found.

    Attributes:
        statuses: Answers by kind of shot and status; 0 where there was none to wait for.
        faults: Numbers of the shots whose answers were wrong, and what was.
    """

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    faults: list[tuple[int, str]] = field(default_factory=list)

    def by_status(self) -> dict[str, int]:
        """Answers of each status."""
        total: Counter[str] = Counter()
        for (_, status), number in self.statuses.items():
            total[str(status)] += number
        return dict(sorted(total.items()))


async def campaign(
    url: str,
    seed: int,
    numbers: range,
    key: str | None = None,
    watch: Callable[[int], None] = lambda _: None,
) -> Findings:
    """Fire the shots of these numbers, a few at a time; ``watch`` is told how many have been."""
    address = urlsplit(url)
    target = Target(address.hostname or "", address.port or 80, key)
    findings, left = Findings(), iter(numbers)
    judge = Judge.of(httpx.get(f"{url}/openapi.json").json())
    workers = [_work(left, seed, target, judge, findings, watch) for _ in range(CONNECTIONS)]
    await asyncio.gather(*workers)
    return findings


async def _work(
    left: Iterator[int],
    seed: int,
    target: Target,
    judge: Judge,
    findings: Findings,
    watch: Callable[[int], None],
) -> None:
    for number in left:
        made = shot(seed, number)
        try:
            answer = await fire(made, target)
        except TimeoutError:
            findings.faults.append((number, "hangs"))
            continue
        findings.statuses[made.kind, answer.status] += 1
        if (fault := judge.fault(made, answer)) is not None:
            findings.faults.append((number, f"{answer.status} {fault}"))
        watch(findings.statuses.total())
