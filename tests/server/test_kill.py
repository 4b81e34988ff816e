"""``kill -9`` in the middle of registrations: see ``kill_rounds.py``, which can run many more."""

from .kill_rounds import run


def test_a_registry_that_is_killed_has_all_that_was_acknowledged():
    assert run(rounds=8, seed=7) > 8
