"""The ``deltamux`` command. Errors of use exit 2 with one line that says what to do."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import yaml

from .config import ServeConfig, default_state_dir
from .option_types import Bytes, NamedAdapter, Sources
from .store.sources import DEFAULT_PATTERNS
from .tenants.command import tenants

_LATER = "is not in this release; see the roadmap in CHANGELOG.md"


def _option(flag: str, **attributes: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """An option with its ``DELTAMUX_`` environment twin."""
    name = flag.removeprefix("--")
    return click.option(
        flag,
        envvar=f"DELTAMUX_{name.replace('-', '_').upper()}",
        show_envvar=True,
        show_default=attributes.pop("show_default", True),
        **attributes,
    )


def _read_config_file(ctx: click.Context, _: click.Parameter, path: Path | None) -> Path | None:
    """Make the file's values the defaults of the options that are not given."""
    if path is None:
        return None
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise click.UsageError(f"config file {path}: {error}") from error
    if not isinstance(values, dict):
        raise click.UsageError(f"config file {path}: must be a mapping of option names to values")
    params = {str(param.name): param for param in ctx.command.params if param.name != "config"}
    named = {str(key).replace("-", "_"): value for key, value in values.items()}
    if unknown := sorted(set(named) - set(params)):
        raise click.UsageError(
            f"config file {path}: unknown key {unknown[0]!r}; known: {', '.join(sorted(params))}"
        )
    ctx.default_map = {
        name: _config_value(f"config file {path}: {name}", value, params[name])
        for name, value in named.items()
    }
    return path


def _config_value(where: str, value: object, param: click.Parameter) -> object:
    """A key's value as its option takes it; a repeatable one may be a list or a mapping."""
    if isinstance(param, click.Option) and param.multiple:
        if isinstance(value, dict):
            return [f"{name}={item}" for name, item in value.items()]
        return value if isinstance(value, list) else [value]
    if isinstance(value, list | dict):
        raise click.UsageError(f"{where}: takes one value, not {value!r}")
    return value


def _refuse(*later: str) -> Callable[[click.Context, click.Parameter, str], str]:
    """Values that are named here for what they will mean, and refused until they do."""

    def check(ctx: click.Context, param: click.Parameter, value: str) -> str:
        if value in later:
            raise click.UsageError(f"{param.opts[0]} {value} {_LATER}", ctx)
        return value

    return check


def main() -> None:
    """Run the command line; an error of use is one line on standard error and exit status 2."""
    try:
        sys.exit(cli.main(standalone_mode=False))
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        click.echo(f"deltamux: {error.format_message()}", err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="deltamux")
def cli() -> None:
    """Serve many fine-tunes of one frozen base model."""


@cli.command()
@click.argument("model", default="smollm2", envvar="DELTAMUX_MODEL")
@_option(
    "--served-model-name", metavar="NAME", help="The base's name in the API.  [default: MODEL]"
)
@_option(
    "--adapter",
    type=NamedAdapter(),
    multiple=True,
    metavar="NAME=PATH",
    help="Serve an adapter from a folder, an archive or a URL; a refused one stops the start. "
    "Repeatable; in the environment several are separated by colons.",
)
@_option(
    "--adapter-dir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    multiple=True,
    help="Serve every adapter folder directly inside, under its folder's name, and follow what is "
    "added, changed and removed there; a refused one is listed as failed. Repeatable.",
)
@_option(
    "--adapter-source",
    type=Sources(),
    multiple=True,
    default=DEFAULT_PATTERNS,
    show_default=", ".join(DEFAULT_PATTERNS),
    metavar="SOURCE",
    help="Where the API may load adapters from: local (any path), upload, or the beginning of a "
    "path or URL, as hf://my-org or s3://bucket/adapters/. Repeatable; in the environment several "
    "are separated by commas.",
)
@_option(
    "--adapter-versions",
    type=click.IntRange(1, 1000),
    default=5,
    metavar="N",
    help="Versions of an adapter that are kept to go back to, the default one included.",
)
@_option(
    "--store-budget", type=Bytes(), metavar="BYTES", help="Disk that copies of adapters may take."
)
@_option(
    "--max-adapter-size",
    type=Bytes(),
    default="8GiB",
    metavar="BYTES",
    help="Largest adapter that is copied, fetched or unpacked.",
)
@_option(
    "--max-upload-size",
    type=Bytes(),
    default="2GiB",
    metavar="BYTES",
    help="Largest archive that may be uploaded.",
)
@_option(
    "--no-adapter-copies",
    is_flag=True,
    help="Read local adapters where they are instead of copying them into the state folder; "
    "versions whose files change are then gone.",
)
@_option(
    "--tenants",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="YAML file of tenants and admin keys, followed as it changes; or see `deltamux tenants`.",
)
@_option(
    "--state-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=default_state_dir,
    show_default="the user's state folder",
    help="Where adapters, their registry and converted models are kept; of one server at a time.",
)
@_option("--host", default="127.0.0.1", help="Address to listen on.")
@_option("--port", type=click.IntRange(0, 65535), default=8000, help="Port to listen on.")
@_option(
    "--allow-open",
    is_flag=True,
    help="Listen where other machines can reach it without having tenants.",
)
@_option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    help="Where the base lives; auto: on an NVIDIA GPU where there is one.",
)
@_option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    help="auto: bfloat16 where the device computes in it, else float16 on a GPU, float32 on a CPU.",
)
@_option(
    "--quantization",
    type=click.Choice(["none", "nf4", "int8", "int4"]),
    default="none",
    callback=_refuse("nf4", "int8", "int4"),
    help="Of the base's weights.",
)
@_option(
    "--max-model-len",
    type=click.IntRange(1),
    metavar="N",
    help="Longest prompt and output together.  [default: the model's]",
)
@_option(
    "--max-num-seqs",
    type=click.IntRange(1, 4096),
    default=64,
    metavar="N",
    help="Sequences in one step.",
)
@_option(
    "--max-num-batched-tokens",
    type=click.IntRange(1),
    default=512,
    metavar="N",
    help="Tokens in one step; longer prompts are computed in chunks.",
)
@_option(
    "--max-waiting",
    type=click.IntRange(0),
    default=1024,
    metavar="N",
    help="Requests that may wait beyond those that run; more are answered 429.",
)
@_option(
    "--block-size",
    type=click.IntRange(1, 1024),
    default=16,
    metavar="N",
    help="Tokens of one KV block.",
)
@_option(
    "--memory-budget",
    type=Bytes(),
    default="4GiB",
    metavar="BYTES",
    help="Device memory that KV cache and adapters share, beside the base's weights.",
)
@_option(
    "--host-memory-budget",
    type=Bytes(),
    default="4GiB",
    metavar="BYTES",
    help="Host memory for adapters that are not on the device.",
)
@_option(
    "--no-prefix-caching",
    is_flag=True,
    help="Do not share the computed blocks of common prefixes.",
)
@_option(
    "--no-cuda-graphs",
    is_flag=True,
    help="Launch decode steps on a GPU kernel by kernel.",
)
@_option(
    "--cors-origin",
    multiple=True,
    metavar="ORIGIN",
    help="Let web pages of this origin call the API, * for any. Repeatable.  [default: none may]",
)
@_option(
    "--tool-call-parser",
    type=click.Choice(["auto", "hermes", "mistral", "llama3_json"]),
    default="auto",
    help="How the base writes tool calls; auto: as its chat template teaches.",
)
@_option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    help="Of log lines on standard error: for people, or a JSON object each.",
)
@_option(
    "--otlp-traces-endpoint",
    metavar="URL",
    help="Send an OpenTelemetry trace of every request to this collector, as "
    "http://localhost:4317; needs deltamux[otel].",
)
@_option(
    "--kernels",
    type=click.Choice(["auto", "compiled", "triton", "interpret", "reference"]),
    default="auto",
    help="Device operations: compiled C++ on the CPU, Triton's on a GPU, those interpreted on the "
    "CPU, or plain torch.",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="DELTAMUX_CONFIG",
    is_eager=True,
    expose_value=False,
    callback=_read_config_file,
    help="YAML file with these options as keys; given options and the environment win.",
)
def serve(
    model: str,
    served_model_name: str | None,
    adapter: tuple[tuple[str, str], ...],
    adapter_dir: tuple[Path, ...],
    adapter_source: tuple[str, ...],
    no_adapter_copies: bool,
    quantization: str,
    no_prefix_caching: bool,
    no_cuda_graphs: bool,
    cors_origin: tuple[str, ...],
    **options: Any,
) -> None:
    """Serve MODEL: smollm2, a Hugging Face folder, a .gguf file or a hub id."""
    del quantization
    config = ServeConfig(
        model=model,
        served_model_name=served_model_name or model,
        adapters=adapter,
        adapter_dirs=adapter_dir,
        adapter_sources=adapter_source,
        copy_adapters=not no_adapter_copies,
        prefix_caching=not no_prefix_caching,
        cuda_graphs=not no_cuda_graphs,
        cors_origins=cors_origin,
        **options,
    )
    # Here and not above, so that --help does not wait for what a server imports.
    from .serve import ServeError, run

    try:
        run(config)
    except ServeError as error:
        raise click.UsageError(str(error)) from error


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
def inspect(path: Path) -> None:
    """Tell what an adapter folder is: kind, rank, size, primitives; or why it is refused."""
    from ..adapters.errors import AdapterError
    from ..adapters.inspect import describe

    try:
        adapter = describe(path)
    except AdapterError as error:
        click.echo(f"refused: {error}")
        raise SystemExit(1) from error
    lines = {
        "kind": f"{adapter.kind} ({adapter.library})",
        "digest": adapter.digest,
        "base model": adapter.base_model or "not named",
        "ranks": ", ".join(map(str, adapter.ranks)) or "none",
        "modules": f"{adapter.num_modules} ({', '.join(adapter.target_modules)})"
        if adapter.num_modules
        else "none",
        "parameters": f"{adapter.num_parameters:,}",
        "device bytes": f"about {adapter.num_bytes_bfloat16:,} in bfloat16",
        "primitives": ", ".join(f"{count} {name}" for name, count in adapter.primitives.items()),
    }
    for name, value in lines.items():
        click.echo(f"{name + ':':<14}{value}")


@cli.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: tuple[str, ...]) -> None:
    """Measure kernels, compile them for GPUs that are not there, count what a step must cost."""
    from ..benchmarks.cli import bench as command

    sys.exit(command.main(list(arguments), prog_name="deltamux bench", standalone_mode=False))


cli.add_command(tenants)
