"""llama.cpp's server, built from the sources that llama-cpp-python ships."""

import tarfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx

from ...client import Request
from ..environment import Environment
from ..process import SystemFailed, Word, foreign_environment, run_tool
from ..scenarios import BASE
from .peer import Peer, Setup
from .server import SILENCE_SECONDS, Server, start_server

NAME = "llama.cpp"
_VERSION = "0.3.36"
_CONTEXT_STEP = 256
"""A slot's context is rounded up to a multiple of it."""
_SOURCES = f"llama-cpp-python=={_VERSION}"
_ENVIRONMENT = Environment(
    "llama-cpp",
    # For its converters; without sentencepiece they do not look at other tokenizers either.
    ("torch==2.13.0", "transformers==5.23.0", "sentencepiece==0.2.1", "gguf==0.19.0"),
)
_CMAKE = (
    *("-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF"),
    *("-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_OPENSSL=OFF"),
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)


@dataclass(slots=True)
class _LlamaServer(Server):
    """llama-server: tells token ids only on a route of its own."""

    def answer(self, requests: Sequence[Request]) -> list[list[int]]:
        """Token ids, all requests in flight at once; raises SystemFailed."""
        with (
            httpx.Client(base_url=self.url, timeout=SILENCE_SECONDS, trust_env=False) as client,
            ThreadPoolExecutor(len(requests)) as threads,
        ):
            return list(threads.map(lambda request: self._ask(client, request), requests))

    def _ask(self, client: httpx.Client, request: Request) -> list[int]:
        body = {
            "prompt": request.prompt,
            "n_predict": request.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_tokens": True,
            **self.extras[request.model],
        }
        try:
            answer = client.post("/completion", json=body).raise_for_status().json()
        except httpx.HTTPError as error:
            raise SystemFailed(f"a request failed: {error}") from error
        return list(answer["tokens"])


def _start(setup: Setup) -> Server:
    python = setup.environments.python(_ENVIRONMENT)
    folder = setup.environments.folder / "llama-cpp-sources"
    log = setup.log("llama.cpp-build")
    sources = _unpacked(folder, python, log)
    server = _built(folder, sources, setup, log)
    model, adapters = _converted(sources, python, setup)
    arguments = _arguments(setup, model, adapters)
    process, url = start_server(
        [server, *arguments], setup.log(NAME), foreign_environment({}), "/health"
    )
    return _LlamaServer(
        process,
        url,
        versions={"llama.cpp of llama-cpp-python": _VERSION},
        settings={"command": ["llama-server", *arguments], "cmake": _CMAKE},
        extras=_extras(list(adapters)),
        reuse=False,  # it closes them after an answer, a moment too late to be noticed
    )


def _unpacked(folder: Path, python: Path, log: Path) -> Path:
    """llama.cpp's sources."""
    folder.mkdir(parents=True, exist_ok=True)
    found = list(folder.glob("llama_cpp_python-*/vendor/llama.cpp"))
    if not found:
        pip: list[Word] = [
            python,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "download",
            "--no-deps",
        ]
        run_tool([*pip, "--no-binary", ":all:", "--dest", folder, _SOURCES], log)
        [archive] = folder.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
        found = list(folder.glob("llama_cpp_python-*/vendor/llama.cpp"))
    return found[0]


def _built(folder: Path, sources: Path, setup: Setup, log: Path) -> Path:
    """The server, compiled for the processor at hand."""
    server = folder / "build" / "bin" / "llama-server"
    if not server.is_file():
        build = folder / "build"
        setup.environments.say(f"compiling llama.cpp, which takes minutes; see {log}")
        run_tool(["cmake", "-S", sources, "-B", build, *_CMAKE], log)
        jobs = ["--parallel", str(setup.threads)]
        run_tool(["cmake", "--build", build, "--target", "llama-server", *jobs], log)
    return server


def _converted(sources: Path, python: Path, setup: Setup) -> tuple[Path, Mapping[str, Path]]:
    """The base and the adapters as GGUF files, in bfloat16."""
    log, material = setup.log("llama.cpp-convert"), setup.material
    folder = material.folder / "gguf"
    folder.mkdir(exist_ok=True)
    model = folder / "base.gguf"
    options = ["--outtype", "bf16", "--outfile"]
    if not model.is_file():
        run_tool([python, sources / "convert_hf_to_gguf.py", material.base, *options, model], log)
    adapters = {name: folder / f"{name}.gguf" for name in material.adapters}
    convert: list[Word] = [python, sources / "convert_lora_to_gguf.py", "--base", material.base]
    for name, file in adapters.items():
        if not file.is_file():
            run_tool([*convert, *options, file, material.adapters[name]], log)
    return model, adapters


def _arguments(setup: Setup, model: Path, adapters: Mapping[str, Path]) -> list[str]:
    streams, threads = setup.size.streams, str(setup.threads)
    context = -(-setup.context // _CONTEXT_STEP) * _CONTEXT_STEP
    arguments = ["--model", str(model), "--alias", BASE, "--threads", threads]
    arguments += ["--parallel", str(streams), "--ctx-size", str(streams * context)]
    arguments += ["--threads-batch", threads, "--lora-init-without-apply"]
    for file in adapters.values():
        arguments += ["--lora", str(file)]
    return arguments


def _extras(names: Sequence[str]) -> dict[str, dict[str, object]]:
    """What picks an adapter: its number, with a scale; all others are off."""
    off: dict[str, dict[str, object]] = {
        BASE: {"lora": [{"id": index, "scale": 0.0} for index in range(len(names))]}
    }
    return off | {name: {"lora": [{"id": index, "scale": 1.0}]} for index, name in enumerate(names)}


PEER = Peer(
    NAME,
    "llama.cpp's server over HTTP, a request's adapter by its field lora",
    _start,
)
