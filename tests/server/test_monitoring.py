"""The page of series and the dashboard against a real scrape: nothing missing, nothing made up."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from deltamux.server.metrics.by_name import MAX_NAMES
from deltamux.server.usage.records import DIMENSIONS

from .fake_engine import Running, serving
from .fake_store import write_adapter

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
GRAFANA = ROOT / "deploy" / "grafana"
BOARD = json.loads((GRAFANA / "dashboard.json").read_text(encoding="utf-8"))
ROW = re.compile(r"^\| `((?:vllm|deltamux):\w+)` \| (\w+) \| ((?:`\w+`(?:, )?)*) ?\|", re.MULTILINE)
ADDED_BY_PROMETHEUS = {"instance", "job", "le"}

Series = dict[str, tuple[str, frozenset[str]]]


@pytest.fixture(scope="module")
def scrape(tokenizer) -> Iterator[Series]:
    """Every family by its name, with its type and labels, once there was some traffic."""
    with serving(tokenizer) as server:
        yield families(server)


def families(server: Running) -> Series:
    path = write_adapter(server.state_dir / "shelf" / "poet", "poet")
    body = {"lora_name": "poet", "lora_path": str(path)}
    httpx.post(f"{server.url}/v1/load_lora_adapter", json=body).raise_for_status()
    body = {"model": "poet", "prompt": "one two"}
    httpx.post(f"{server.url}/v1/completions", json=body, timeout=30).raise_for_status()
    text = httpx.get(f"{server.url}/metrics").text
    found: Series = {}
    for family in text_string_to_metric_families(text):
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {label for sample in family.samples for label in sample.labels}
        found[name] = (family.type, frozenset(labels - {"le"}))
    return found


def test_the_page_lists_exactly_what_there_is(scrape):
    listed = {
        name: (kind, frozenset(re.findall(r"\w+", labels)))
        for name, kind, labels in ROW.findall(PAGE)
    }
    made = {name for name in scrape if name.endswith("_created")}
    beside = {created_beside(name, kind) for name, (kind, _) in scrape.items()}
    assert made <= beside
    assert listed == {name: found for name, found in scrape.items() if name not in made}


def created_beside(name: str, kind: str) -> str:
    """The gauge that Prometheus' client makes beside a family of that kind."""
    return f"{name.removesuffix('_total') if kind == 'counter' else name}_created"


def test_the_page_tells_the_bound_and_the_groups(scrape):
    assert f"**At most {MAX_NAMES} tenants and {MAX_NAMES} adapters**" in PAGE
    assert all(f"`{name}`" in PAGE for name in DIMENSIONS)


def queries() -> list[tuple[str, str]]:
    """(panel, expression) of every query, with Grafana's variables filled in."""
    fill = {"$__rate_interval": "1m", "$instance": ".*"}
    found = []
    for panel in BOARD["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"]
            for variable, value in fill.items():
                expression = expression.replace(variable, value)
            found.append((panel["title"], expression))
    return found


class Reader:
    """Collects, from a parsed query, the series it reads and the labels it needs of them."""

    def __init__(self, expression: str) -> None:
        self.selected: dict[str, set[str]] = {}
        self.grouped: set[str] = set()
        self.read(promql_parser.parse(expression))

    def read(self, node) -> None:
        match node:
            case promql_parser.VectorSelector():
                matched = {each.name for each in node.matchers.matchers}
                self.selected.setdefault(node.name, set()).update(matched)
            case promql_parser.MatrixSelector():
                self.read(node.vector_selector)
            case promql_parser.AggregateExpr():
                if node.modifier is not None:
                    self.grouped |= set(node.modifier.labels)
                self.read(node.expr)
            case promql_parser.Call():
                for argument in node.args:
                    self.read(argument)
            case promql_parser.BinaryExpr():
                self.read(node.lhs)
                self.read(node.rhs)
            case promql_parser.NumberLiteral():
                pass
            case _:
                raise AssertionError(f"teach this test to read {type(node).__name__}")


def family_of(name: str, scrape: Series) -> str:
    """The family that a series belongs to."""
    for suffix in ("", "_bucket", "_sum", "_count"):
        stem = name.removesuffix(suffix) if suffix else name
        if stem in scrape and (not suffix or scrape[stem][0] in ("histogram", "summary")):
            assert suffix or scrape[stem][0] in ("gauge", "counter"), f"{name} is no series"
            assert (suffix != "_bucket") or scrape[stem][0] == "histogram"
            return stem
    raise AssertionError(f"/metrics has no series {name}")


@pytest.mark.parametrize(("panel", "expression"), queries())
def test_a_panels_query_reads_series_and_labels_that_there_are(scrape, panel, expression):
    reader = Reader(expression)
    assert reader.selected, panel
    for name, matched in reader.selected.items():
        labels = scrape[family_of(name, scrape)][1] | ADDED_BY_PROMETHEUS
        assert matched <= labels, panel
        assert reader.grouped <= labels, panel


def test_the_reader_finds_what_is_wrong(scrape):
    for name in ("vllm:nothing", "vllm:prompt_tokens", "vllm:iteration_tokens_total"):
        with pytest.raises(AssertionError):
            family_of(name, scrape)
    reader = Reader('sum by (colour) (rate(vllm:prompt_tokens_total{shape="x"}[5m])) / 2')
    assert reader.selected == {"vllm:prompt_tokens_total": {"shape"}}
    assert reader.grouped == {"colour"}


def test_legends_name_labels_that_the_query_keeps():
    for panel in BOARD["panels"]:
        for target in panel.get("targets", []):
            shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            by = re.findall(r" by \(([\w, ]+)\)", target["expr"])
            assert all(shown <= set(re.findall(r"\w+", labels)) for labels in by), panel["title"]
            assert not shown or by, panel["title"]


def test_every_series_is_on_the_dashboard(scrape):
    shown = {family_of(name, scrape) for _, query in queries() for name in Reader(query).selected}
    assert {name for name in scrape if not name.endswith("_created")} == shown


def test_grafana_finds_everything():
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    variables = {each["name"] for each in BOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(BOARD)))
    assert {name for name in used if not name.startswith("__")} <= variables
    for file in (GRAFANA / "provisioning").rglob("*.yaml"):
        assert yaml.safe_load(file.read_text())["apiVersion"] == 1
    [scraped] = yaml.safe_load((ROOT / "deploy" / "prometheus.yaml").read_text())["scrape_configs"]
    assert scraped["static_configs"]
