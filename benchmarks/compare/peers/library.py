"""Systems that are libraries: a worker of theirs, asked in lines of JSON (``workers/loop.py``)."""

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ...client import Request
from ...load.run import Outcome, Record
from ..environment import Environment, versions
from ..process import Process, Word, foreign_environment
from ..scenarios import Scenario, Size
from .peer import Setup

_WORKERS = Path(__file__).parents[1]
"""The folder from which ``python -m workers.NAME`` finds a worker, and nothing else of ours."""


class Worker:
    """A program of ``workers/`` in the environment of its library."""

    def __init__(
        self,
        name: str,
        python: Path,
        setup: Setup,
        log: Path,
        variables: Mapping[str, str],
        **more: object,
    ) -> None:
        """Start it and have it load what is served; raises SystemFailed."""
        adapters = {name: str(folder) for name, folder in setup.material.adapters.items()}
        env = foreign_environment({"HF_HUB_OFFLINE": "1", **variables})
        command: list[Word] = [python, "-m", f"workers.{name}"]
        self._process = Process(command, log, env, cwd=_WORKERS, talks=True)
        try:
            self.ask(
                "start",
                base=str(setup.material.base),
                adapters=adapters,
                threads=setup.threads,
                streams=setup.size.streams,
                **more,
            )
        except BaseException:
            self.end()
            raise

    def ask(self, do: str, **fields: object) -> Any:
        """Its answer; raises SystemFailed if it died."""
        return json.loads(self._process.ask(json.dumps({"do": do, **fields})))

    def freeze(self) -> None:
        """Take no time of any core until thawed."""
        self._process.freeze()

    def thaw(self) -> None:
        """Go on."""
        self._process.thaw()

    def end(self) -> None:
        """End it."""
        self._process.end()


class Library(Worker):
    """A library as a system under comparison.

    Attributes:
        versions: Of what it is made of.
        settings: How it was started.
    """

    def __init__(
        self, name: str, worker: str, setup: Setup, environment: Environment, **settings: object
    ) -> None:
        """Install and start it; raises SystemFailed."""
        python = setup.environments.python(environment)
        self.versions: Mapping[str, object] = versions(python, environment.packages)
        self.settings: Mapping[str, object] = {**settings, "threads": setup.threads}
        super().__init__(worker, python, setup, setup.log(name), {}, **settings)

    def answer(self, requests: Sequence[Request]) -> list[list[int]]:
        """Token ids, all requests in flight at once; raises SystemFailed."""
        records = self._run(requests, len(requests), None)["records"]
        return [record["token_ids"] for record in records]

    def run(self, scenario: Scenario, size: Size, phase: str) -> Outcome:
        """Warm up, then measure; raises SystemFailed."""
        workload = scenario.workload(size, phase)
        warmup = [each.request for each in workload.warm_up()]
        self._run(warmup, scenario.streams, None)
        requests = [each.request for each in workload.planned()]
        ran = self._run(requests, scenario.streams, size.seconds)
        pairs = zip(islice(requests, len(ran["records"])), ran["records"], strict=True)
        return Outcome(
            records=[_record(request, record) for request, record in pairs],
            seconds=ran["seconds"],
            cpu_seconds=0.0,  # of a load generator, which there is none
            warmup_errors=[],
        )

    def _run(self, requests: Sequence[Request], streams: int, seconds: float | None) -> Any:
        asked = [
            {"model": each.model, "prompt": each.prompt, "output_tokens": each.output_tokens}
            for each in requests
        ]
        return self.ask("run", requests=asked, streams=streams, seconds=seconds)


def _record(request: Request, told: Mapping[str, Any]) -> Record:
    wrong = len(told["token_ids"]) != request.output_tokens
    return Record(
        model=request.model,
        tenant=None,
        due=None,
        sent=told["sent"],
        ended=told["times"][-1],
        times=np.array(told["times"]),
        tokens=np.array(told["tokens"], dtype=np.int64),
        prompt_tokens=len(request.prompt),
        error=f"gave {len(told['token_ids'])} tokens" if wrong else None,
    )
