"""How a benchmark refuses."""


class BenchmarkError(Exception):
    """What was asked for cannot be measured or counted; the message says why, and what to do."""
