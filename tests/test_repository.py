"""What keeps the repository readable: the direction of imports, the layout, and DESIGN.md's map."""

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from deltamux.adapters.documentation import document

from .kind_table import named_tests, render
from .kinds import FAMILIES
from .kinds import names as case_names

ROOT = Path(__file__).parents[1]
# Each folder may import from itself and from those before it.
LAYERS = ("kernels", "adapters", "server", "benchmarks")
# The command line alone looks ahead, and only inside the function of a command.
COMMAND_LINE = ROOT / "server" / "cli.py"
SOURCE_SUFFIXES = {".py", ".cpp", ".h"}
MAX_DEMO_ADAPTER_BYTES = 2 * 1000 * 1000
DEMO_FILES = [
    ("adapter_config.json", "adapter_model.safetensors"),
    ("adapter_config.json", "adapter.safetensors"),
    ("delta_config.json", "delta.safetensors"),
]


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def source_files() -> list[str]:
    """Paths of the product's sources, relative to the repository."""
    files = (path for layer in LAYERS for path in (ROOT / layer).rglob("*"))
    return sorted(str(p.relative_to(ROOT)) for p in files if p.suffix in SOURCE_SUFFIXES)


def imported_modules(path: Path, *, in_functions: bool = True) -> Iterator[str]:
    """Absolute names of all modules that a file imports, at the top or inside a function.

    ``from .x import y`` in server/api/a.py gives deltamux.server.api.x.
    """
    package = ["deltamux", *path.relative_to(ROOT).parent.parts]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if in_functions else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def is_backward(importer: str, module: str) -> bool:
    """Whether a file of layer ``importer`` may not import ``module``."""
    for prefix in ("deltamux.", "src.deltamux."):
        module = module.removeprefix(prefix)
    layer = module.split(".")[0]
    return layer in LAYERS and LAYERS.index(layer) > LAYERS.index(importer)


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_kernels_adapters_server_benchmarks(layer: str) -> None:
    backward = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in python_files(layer)
        for module in imported_modules(path, in_functions=path != COMMAND_LINE)
        if is_backward(layer, module)
    ]
    assert backward == []


def test_the_command_line_reaches_the_benchmarks_by_their_command_alone() -> None:
    ahead = [each for each in imported_modules(COMMAND_LINE) if is_backward("server", each)]
    assert ahead == ["deltamux.benchmarks.cli.bench"]


@pytest.mark.parametrize(
    ("importer", "module", "backward"),
    [
        ("kernels", "deltamux.adapters.layout", True),
        ("kernels", "server", True),
        ("adapters", "deltamux.server.config.ServeConfig", True),
        ("adapters", "deltamux.kernels.affine.op", False),
        ("server", "deltamux.adapters.batch", False),
        ("server", "torch", False),
        ("server", "deltamux.benchmarks.cli", True),
        ("benchmarks", "deltamux.server.model.source", False),
    ],
)
def test_the_import_rule_itself(importer: str, module: str, backward: bool) -> None:
    assert is_backward(importer, module) is backward


def test_relative_imports_are_resolved() -> None:
    """The rule above is only as good as this: batch.py is known to import from kernels."""
    modules = set(imported_modules(ROOT / "adapters" / "device" / "batch.py"))
    assert "deltamux.kernels.tables.Segments" in modules


def test_the_scheduler_is_free_of_torch() -> None:
    importers = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in python_files("server/scheduler")
        for module in imported_modules(path)
        if module.split(".")[0] in {"torch", "numpy", "triton"}
    ]
    assert importers == []


@pytest.mark.parametrize("layer", LAYERS)
def test_no_package_files_that_would_shadow_pypi_names(layer: str) -> None:
    assert list((ROOT / layer).rglob("__init__.py")) == []


@pytest.mark.parametrize("layer", LAYERS)
def test_the_import_name_links_to_the_folder(layer: str) -> None:
    link = ROOT / "src" / "deltamux" / layer
    assert link.is_symlink()
    assert os.readlink(link) == f"../../{layer}"
    assert link.resolve() == ROOT / layer


def named_in_design() -> set[str]:
    """Every file name or path with one of our source suffixes that DESIGN.md mentions."""
    text = (ROOT / "DESIGN.md").read_text(encoding="utf-8")
    return set(re.findall(r"[\w./-]*\w\.(?:py|cpp|h)\b", text))


def names(mention: str, path: str) -> bool:
    """Whether the mention, a path or its last parts, names the file at ``path``."""
    return path == mention or path.endswith(f"/{mention}")


def test_design_names_every_source_file() -> None:
    mentions = named_in_design()
    missing = [path for path in source_files() if not any(names(m, path) for m in mentions)]
    assert missing == []


def test_design_names_no_file_that_does_not_exist() -> None:
    folders = (*LAYERS, "examples", "tests", "src", "deploy")
    paths = [str(p.relative_to(ROOT)) for folder in folders for p in (ROOT / folder).rglob("*")]
    unknown = [m for m in named_in_design() if not any(names(m, path) for path in paths)]
    assert sorted(unknown) == []


def test_no_file_names_a_path_of_one_machine() -> None:
    suffixes = {".py", ".cpp", ".h", ".md", ".toml", ".yaml", ".json", ".sh", ".tsv"}
    # Homes, and folders of the machines this was written on, spelled so as not to find this line.
    private = re.compile("|".join(f"/{name}/" for name in ("home", "root", "Users", "work", "tmp")))
    folders = (*LAYERS, "examples", "tests", "docs", "deploy")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    files += [path for path in ROOT.iterdir() if path.is_file()]
    texts = [p for p in files if p.suffix in suffixes or p.name in {"Makefile", "Dockerfile"}]
    offenders = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in texts
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if private.search(line)
    ]
    assert offenders == []


def test_the_makefile_has_the_targets_that_are_promised() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", text, flags=re.MULTILINE))
    assert {"serve", "test", "lint", "bench", "demo-adapters", "clean", "help"} <= targets
    phony = re.search(r"^\.PHONY: (.*)$", text, flags=re.MULTILINE)
    assert phony is not None
    assert set(phony.group(1).split()) == targets


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").splitlines()[-1] == "exec make test"


def test_demo_adapters_are_complete_small_and_neutral() -> None:
    folders = sorted((ROOT / "examples" / "adapters").iterdir())
    assert len(folders) >= 5
    for folder in folders:
        files = {path.name: path.stat().st_size for path in folder.iterdir()}
        [(config_file, _)] = [pair for pair in DEMO_FILES if files.keys() == set(pair)]
        assert sum(files.values()) <= MAX_DEMO_ADAPTER_BYTES, folder.name
        config = (folder / config_file).read_text(encoding="utf-8")
        assert '"HuggingFaceTB/SmolLM2-135M-Instruct"' in config, folder.name


def test_readme_holds_the_table_of_kinds() -> None:
    """``python -m tests.kind_table`` prints what belongs there."""
    assert render() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_kinds_names_tests_that_there_are() -> None:
    known = {f"{family}-{name}" for family in FAMILIES for name in case_names(family)}
    assert sorted(named_tests() - known) == []


def test_the_page_of_kinds_is_what_the_kinds_say() -> None:
    """``make docs`` writes it."""
    page = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    assert page == document() + "\n"
