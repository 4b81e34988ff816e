import json

from deltamux.benchmarks.structured import Workload, run


def test_steps_are_timed_with_and_without_a_schema(tiny_model, capsys):
    base = str(tiny_model("llama"))
    run(Workload(base=base, rows=4, context=5, steps=6, rounds=1))
    *rows, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    assert report["step_ms"].keys() == {"none", "half", "all"}
    assert all(each > 0 for each in report["step_ms"].values())
    assert report["workload"]["rows"] == 4
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["none", "half", "all"]
