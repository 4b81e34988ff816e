"""``kill -9`` under load: see ``usage_rounds.py``, which can run many more."""

from .usage_rounds import NOTHING, run_scripted


def test_a_server_that_is_killed_has_counted_what_its_clients_received():
    rounds = run_scripted(kills=3, seed=11)
    assert rounds.kills == 3
    assert rounds.received() != NOTHING
