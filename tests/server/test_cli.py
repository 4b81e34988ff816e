"""What the command line makes of options, environment and config file; nothing is served."""

import pytest
from click.testing import CliRunner

from deltamux.server.cli import cli
from deltamux.server.config import ServeConfig, parse_bytes


@pytest.fixture
def serve(monkeypatch):
    """Run ``deltamux serve`` up to the server: the config it would run, or what it said."""
    started: list[ServeConfig] = []
    monkeypatch.setattr("deltamux.server.serve.run", started.append)

    def invoke(*arguments: str, **env: str) -> ServeConfig | str:
        result = CliRunner().invoke(cli, ["serve", *arguments], env=env)
        if result.exit_code == 0:
            return started.pop()
        assert result.exit_code == 2, result.output
        assert not started
        return result.output

    return invoke


def test_defaults(serve):
    config = serve()
    assert (config.model, config.served_model_name) == ("smollm2", "smollm2")
    assert (config.host, config.port, config.prefix_caching) == ("127.0.0.1", 8000, True)


def test_options_win_over_environment_and_that_over_the_file(serve, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("port: 1\nblock-size: 2\nmax_num_seqs: 3\nno-prefix-caching: true\n")
    config = serve(
        "--config", str(file), "--port", "10", DELTAMUX_PORT="20", DELTAMUX_BLOCK_SIZE="21"
    )
    assert (config.port, config.block_size, config.max_num_seqs) == (10, 21, 3)
    assert not config.prefix_caching


def test_every_option_has_an_environment_twin(serve, tmp_path):
    config = serve(
        DELTAMUX_MODEL="m",
        DELTAMUX_ADAPTER="a=x y:b=hf://org/z",
        DELTAMUX_ADAPTER_SOURCE="local, hf://org",
        DELTAMUX_ADAPTER_DIR=str(tmp_path),
        DELTAMUX_NO_PREFIX_CACHING="1",
        DELTAMUX_MEMORY_BUDGET="3MiB",
    )
    assert config.model == "m"
    assert config.adapters == (("a", "x y"), ("b", "hf://org/z"))
    assert config.adapter_dirs == (tmp_path,)
    assert config.adapter_sources == ("local", "hf://org")
    assert (config.prefix_caching, config.memory_budget) == (False, 3 << 20)
    undocumented = [
        option.name
        for option in cli.commands["serve"].params
        if option.envvar != f"DELTAMUX_{option.name.upper()}"
    ]
    assert undocumented == []


@pytest.mark.parametrize("text", ["adapter: [a=x, b=y]", "adapter: {a: x, b: y}"])
def test_repeatable_keys_may_be_lists_or_mappings(serve, tmp_path, text):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert serve("--config", str(file)).adapters == (("a", "x"), ("b", "y"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"nope: 1", "unknown key 'nope'"),
        (b"max-num-seqs: [1, 2]", "max_num_seqs: takes one value"),
        (b"memory-budget: -5", "is not a size"),
        (b"- a list", "must be a mapping"),
        (b"port: {", "config file"),
        (b"port: '\xff'", "config file"),
    ],
)
def test_a_bad_config_file_is_named(serve, tmp_path, content, says):
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    assert says in serve("--config", str(file))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--quantization", "nf4"], "--quantization nf4 is not in this release"),
        (["--adapter", "nameless"], "is not NAME=PATH"),
        (["--memory-budget", "lots"], "is not a size"),
        (["--port", "70000"], "70000"),
    ],
)
def test_what_is_not_served_is_refused_by_name(serve, arguments, says):
    assert says in serve(*arguments)


@pytest.mark.parametrize(
    ("text", "size"),
    [("17", 17), ("4GiB", 4 << 30), ("4GB", 4 * 10**9), ("1.5k", 1536), ("2 MiB", 2 << 20)],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size
