"""Requests made of the OpenAPI page, right and wrong: no failure, and answers that it describes."""

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy, sampled_from
from schemathesis import Case
from schemathesis.generation import GenerationMode
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi import checks

from deltamux.server.api.openapi import DOCS

from .fake_engine import BASE, Running, byte_level_tokenizer, serving

HELD = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]
"""A status that the page does not name fails, and it names few from 500 on."""

RIGHT, WRONG = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
ASKS = [
    *((*route, RIGHT) for route in DOCS),
    *((*route, WRONG) for route, doc in DOCS.items() if doc.request is not None),
    ("get", "/v1/adapters", WRONG),
]

few = settings(
    max_examples=12,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def scripted() -> Iterator[Running]:
    with serving(byte_level_tokenizer()) as running:
        yield running


@pytest.fixture(scope="module")
def page(scripted) -> BaseSchema:
    return schemathesis.openapi.from_url(f"{scripted.url}/openapi.json")


def of_known_models(cases: SearchStrategy[Case]) -> SearchStrategy[Case]:
    """Half of the cases with a model that there is: nobody guesses one."""

    def named(case: Case, known: bool) -> Case:
        if known and isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = BASE
        return case

    return cases.flatmap(lambda case: sampled_from([True, False]).map(lambda k: named(case, k)))


@pytest.mark.parametrize(("method", "path", "mode"), ASKS)
def test_the_page_is_kept(page, method, path, mode):
    answered = []
    cases = page[path][method.upper()].as_strategy(generation_mode=mode)

    @given(case=of_known_models(cases) if mode is RIGHT else cases)
    @few
    def ask(case: Case) -> None:
        answered.append(case.call_and_validate(checks=HELD).status_code)

    ask()
    assert answered


def test_the_engine_was_asked_and_nothing_runs_on(page, scripted):
    assert {each.request_id for each in scripted.engine.submitted} == {*scripted.engine.finished}
