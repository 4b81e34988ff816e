"""What the processes beside the engine do not import: it would stay in their memory."""

import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "accelerate", "gguf", "safetensors", "numpy", "triton"}
FETCHING = {"aiohttp", "fsspec", "huggingface_hub"}


def imported_by(module: str) -> set[str]:
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("module", "unused"),
    [
        ("deltamux.server.serve", HEAVY | FETCHING),
        ("deltamux.server.cli", HEAVY | FETCHING | {"fastapi", "sqlalchemy"}),
        ("deltamux.server.grammar.judge", HEAVY | FETCHING | {"fastapi", "sqlalchemy", "jinja2"}),
    ],
)
def test_processes_import_what_they_use(module, unused):
    """The HTTP process; what every process imports that it starts; the one that tries grammars."""
    imported = imported_by(module)
    assert module in imported
    assert sorted(imported & unused) == []
