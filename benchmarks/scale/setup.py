"""What every scenario is given, and the load that all of them are made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from ..load.arrivals import Closed
from ..load.lengths import Lengths
from ..load.popularity import Popularity
from ..load.workload import Workload
from .fleet import Fleet

BASE = "base"
"""The name under which the base is served."""
Say = Callable[[str], None]
Option = str | Path
"""Of the command line of a server."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much is asked of a server.

    Attributes:
        streams: In flight at any time.
        prompt_tokens: Of every request.
        output_tokens: Of every request, whatever they are.
        requests: Of every run.
        rounds: How often the runs of a scenario take their turns.
        token_ids: That prompts are drawn from.
        seed: Of all that is drawn.
    """

    streams: int
    prompt_tokens: int
    output_tokens: int
    requests: int
    rounds: int
    token_ids: range
    seed: int

    def workload(
        self,
        models: Sequence[str],
        popularity: Popularity,
        phase: str,
        requests: int | None = None,
        warmup: int = 0,
    ) -> Workload:
        """A closed loop over models; two phases of different names share no prompt."""
        return Workload(
            models=tuple(models),
            base=BASE,
            load=Closed(self.streams),
            requests=self.requests if requests is None else requests,
            seconds=None,
            warmup=warmup,
            popularity=popularity,
            prompts=Lengths(self.prompt_tokens, self.prompt_tokens),
            outputs=Lengths(self.output_tokens, self.output_tokens),
            token_ids=self.token_ids,
            seed=Random(f"{self.seed}/{phase}").randrange(1 << 31),
        )


@dataclass(frozen=True, slots=True)
class Setup:
    """What a scenario works with.

    Attributes:
        base: Folder of the base.
        work_dir: Where it may leave things.
        fleet: The adapters.
        size: Of the load.
        threads: Of the server.
        say: Tells what is being done.
    """

    base: Path
    work_dir: Path
    fleet: Fleet
    size: Size
    threads: int
    say: Say

    @property
    def state_dir(self) -> Path:
        """Of the servers that have all adapters registered."""
        return self.fleet.folder.with_name(f"{self.fleet.folder.name}-state")

    def options(self, memory_budget: int, adapters_on_host: int) -> list[Option]:
        """Of a server with all adapters registered, that many of which fit its host memory."""
        host = adapters_on_host * self.fleet.file_bytes
        return [
            *("--adapter-dir", self.fleet.folder, "--dtype", "bfloat16", "--no-prefix-caching"),
            *("--memory-budget", str(memory_budget), "--host-memory-budget", str(host)),
        ]
