"""A few hundred shots of ``tests/fuzz`` at a real server; ``tests/fuzz/run.py`` fires thousands."""

import asyncio

import httpx

from ..fuzz.campaign import campaign
from .served import served
from .siege import eventually, gauges

SHOTS = range(250)


def test_requests_right_and_wrong_are_answered_as_the_page_says(tmp_path):
    with served(tmp_path, "--max-model-len", "2048") as server:
        engine = server.engine_pid()
        found = asyncio.run(campaign(server.url, seed=7, numbers=SHOTS))
        eventually(lambda: set(gauges(server).values()) == {0.0}, lambda: gauges(server))
        assert server.engine_pid() == engine
        assert httpx.get(f"{server.url}/ready").status_code == 200
    assert found.faults == []
    assert found.statuses.total() == len(SHOTS)
    assert found.statuses["good", 200] > 60
    assert found.statuses["mutated", 400] > 30
    assert "ERROR" not in (tmp_path / "log").read_text()
