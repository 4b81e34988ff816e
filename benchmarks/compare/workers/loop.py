"""What all workers share: questions and answers in lines of JSON.

A worker runs in the environment of its library and imports nothing of this package but this file.
Its standard output is for answers alone: whatever a library prints there goes to the log.

    {"do": "start", "base": FOLDER, "adapters": {NAME: FOLDER}, "threads": N, "streams": N, ...}
    {"do": "run", "requests": [{"model", "prompt", "output_tokens"}], "streams": N, "seconds": S}
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Question = Mapping[str, Any]
Clock = Callable[[], float]


def serve(handlers: Mapping[str, Callable[[Question], object]]) -> None:
    """Answer questions until there are no more; an error ends the worker and is in its log."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        question = json.loads(line)
        answer = handlers[question["do"]](question)
        print(json.dumps(answer), file=answers, flush=True)


def in_waves(
    question: Question, generate: Callable[[Sequence[Question], Clock], list[dict[str, Any]]]
) -> dict[str, object]:
    """Run requests in batches of as many as there are streams, each when the last has ended.

    Args:
        question: A "run".
        generate: Makes the records of a batch that is sent now.
    """
    start = time.perf_counter()

    def now() -> float:
        return time.perf_counter() - start

    requests, streams, seconds = question["requests"], question["streams"], question["seconds"]
    records: list[dict[str, Any]] = []
    for first in range(0, len(requests), streams):
        if seconds is not None and now() >= seconds:
            break
        records += generate(requests[first : first + streams], now)
    return {"seconds": now(), "records": records}
