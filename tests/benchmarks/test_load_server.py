"""The load generator on a real server with adapters: its counts are the server's."""

import json
import re
from pathlib import Path

import httpx
from click.testing import CliRunner
from peft import LoraConfig

from deltamux.server.cli import cli

from ..server.peft_oracle import Oracle
from ..server.running import running_server


def test_counts_are_those_of_the_server(tiny_model, tmp_path: Path) -> None:
    model = tiny_model("llama")
    oracle, names = Oracle(model), ("one", "two", "three")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    for seed, name in enumerate(names):
        oracle.save_adapter(config, tmp_path / "adapters" / name, seed, size=0.1)
    options = ["--adapter-dir", str(tmp_path / "adapters"), "--served-model-name", "base"]
    options += ["--memory-budget", "16MiB", "--dtype", "float32"]
    with running_server(model, *options, log=tmp_path / "log", OMP_NUM_THREADS="1") as server:
        command = ["bench", "serve", "--base-url", server.url, "--rate", "60", "--requests", "40"]
        command += ["--adapters", "3", "--popularity", "half-base", "--warmup", "0"]
        command += ["--prompt-tokens", "uniform:4:40", "--output-tokens", "uniform:1:12"]
        command += ["--shared-prefix", "16", "--first-token-id", "3", "--last-token-id", "299"]
        result = CliRunner().invoke(cli, command)
        metrics = httpx.get(f"{server.url}/metrics", trust_env=False).text
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    results, total = report["results"], report["results"]["total"]
    assert (total["completed"], total["prompts_unknown"]) == (40, 0)
    assert report["versions"]["server"]["version"]
    assert results["adapters"].keys() == {"base", *names}
    assert 10 <= results["adapters"]["base"]["completed"] <= 30
    assert (
        sum(each["output_tokens"] for each in results["adapters"].values())
        == total["output_tokens"]
    )
    assert total["prompt_tokens"] == counted(metrics, "vllm:request_prompt_tokens_sum")
    assert total["output_tokens"] == counted(metrics, "vllm:request_generation_tokens_sum")


def counted(metrics: str, name: str) -> float:
    """The server's own count; no request but the measured ones was sent."""
    return sum(float(value) for value in re.findall(rf"^{name}{{.*}} (.*)$", metrics, re.MULTILINE))
