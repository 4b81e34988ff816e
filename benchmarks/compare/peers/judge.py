"""The reference that judges answers, as the parent sees it."""

from collections.abc import Sequence
from pathlib import Path

from ...client import Request
from .hugging_face import ENVIRONMENT
from .library import Worker
from .peer import Setup


class Judge(Worker):
    """transformers and PEFT in float32; see ``workers/reference.py``."""

    def __init__(self, setup: Setup) -> None:
        """Start it; raises SystemFailed."""
        python: Path = setup.environments.python(ENVIRONMENT)
        # It is not measured: where others compute beside it, it had better not spin.
        variables = {"OMP_WAIT_POLICY": "PASSIVE"}
        super().__init__("reference", python, setup, setup.log("reference"), variables)

    def gaps(self, rows: Sequence[tuple[str, Request, list[int]]]) -> list[list[float]]:
        """Of the tokens of each answer; raises SystemFailed."""
        asked = [
            {"model": model, "prompt": request.prompt, "answer": answer}
            for model, request, answer in rows
        ]
        gaps: list[list[float]] = self.ask("gaps", rows=asked)
        return gaps
