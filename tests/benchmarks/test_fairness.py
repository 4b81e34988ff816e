"""The arithmetic of the fairness benchmark, and the tenants file that it starts servers with."""

from pathlib import Path

import numpy as np
import pytest

from deltamux.benchmarks.fairness import (
    Options,
    flood_workload,
    jain,
    key_of,
    ratios,
    service,
    steady_workload,
    summarize,
    tenants_file,
)
from deltamux.benchmarks.load.run import Outcome, Record
from deltamux.server.tenants.directory import TenantDirectory
from deltamux.server.tenants.file import read_tenants

OPTIONS = Options("smollm2", 10.0, 1.0, 16, 1 << 30, Path("out"), 0)


def record(times, tokens, prompt=100, error=None):
    return Record("m", "t", 0.0, 0.5, times[-1], np.array(times), np.array(tokens), prompt, error)


@pytest.mark.parametrize(
    ("values", "index"), [([5, 5, 5], 1.0), ([1, 0, 0, 0], 0.25), ([1, 3], 0.8), ([0, 0], 0.0)]
)
def test_jains_index(values, index):
    assert jain(values) == pytest.approx(index)


def test_service_counts_what_came_between_two_times():
    one = record([1.0, 2.0, 3.0], [1, 2, 4])
    assert service(one, 0, 10) == 100 + 2 * 7
    assert service(one, 1.5, 3.0) == 2 * 2
    assert service(one, 5, 6) == 0
    with pytest.raises(RuntimeError, match="of t failed: broke"):
        service(record([1.0], [1], error="broke"), 0, 10)


def test_latencies_and_their_ratios():
    slow = summarize(Outcome([record([1.5, 1.7], [1, 1]), record([1.0], [1], error="x")], 9, 1, []))
    fast = summarize(Outcome([record([1.0, 1.1], [1, 1])], 9, 1, []))
    assert (slow.requests, slow.failed) == (1, 1)
    assert slow.ttft.p50 == pytest.approx(1000)
    assert ratios(slow, fast) == {
        "ttft_p50": 2.0,
        "ttft_p99": 2.0,
        "gap_mean": 2.0,
        "gap_p50": 2.0,
        "gap_p99": 2.0,
    }


def test_the_server_takes_the_tenants_file_and_knows_the_keys(tmp_path):
    directory = TenantDirectory()
    directory.use_file(read_tenants(tenants_file(tmp_path)))
    for name, weight in (("steady", 1.0), ("flood", 1.0), ("four", 4.0)):
        tenant = directory.caller(key_of(name)).tenant
        assert (tenant.name, tenant.weight) == (name, weight)
    assert directory.caller(key_of("admin")).is_admin


def test_the_flood_is_fifty_times_its_share_over_a_hundred_adapters():
    flood, steady = flood_workload(OPTIONS), steady_workload(OPTIONS)
    assert flood.load.concurrency == 50 * 16 / 2
    assert len(flood.models) == 100
    assert not set(flood.models) & set(steady.models)
    assert flood.seed != steady.seed
