"""What every answer and every route has: request ids, origins, and a page that describes it."""

import asyncio
import re

import httpx
import jsonschema
import pytest

from deltamux.server.api.app import create_app
from deltamux.server.api.openapi import DOCS

ASK = {"model": "base", "prompt": "one two"}
OWN = re.compile(r"req-[0-9a-f]{32}")


def post(server, body, path="/v1/completions", **headers) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, headers=headers, timeout=30)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/completions", ASK, 200),
        ("/v1/completions", {**ASK, "stream": True}, 200),
        ("/v1/completions", {**ASK, "n": 0}, 400),
        ("/v1/completions", {**ASK, "model": "nope"}, 404),
        ("/v1/nothing", {}, 404),
        ("/v1/completions", {**ASK, "user": "x" * (17 << 20)}, 413),
        ("/v1/embeddings", {"model": "base", "input": "x"}, 200),
    ],
)
def test_every_answer_has_an_id(server, path, body, status):
    answer = post(server, body, path)
    assert answer.status_code == status
    assert OWN.fullmatch(answer.headers["x-request-id"])
    named = post(server, body, path, **{"X-Request-Id": "my-request:7"})
    assert named.headers.get_list("x-request-id") == ["my-request:7"]


def test_an_id_that_is_none_is_replaced(server):
    for bad in ("", "x" * 129, "two words"):
        answer = post(server, ASK, **{"X-Request-Id": bad})
        assert OWN.fullmatch(answer.headers["x-request-id"])


def test_a_failure_that_nobody_expected_has_its_id_too(server):
    server.engine.refusal = RuntimeError("a defect")
    answer = post(server, ASK, **{"X-Request-Id": "seven"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "seven")


def test_web_pages_are_kept_out_unless_their_origin_is_named(server):
    headers = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    closed = httpx.options(f"{server.url}/v1/completions", headers=headers)
    assert "access-control-allow-origin" not in closed.headers
    app = create_app(server.state, ["https://a.example"])
    transport = httpx.ASGITransport(app)

    async def preflight(origin: str) -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.options("/v1/completions", headers={**headers, "Origin": origin})

    allowed, other = (
        asyncio.run(preflight("https://a.example")),
        asyncio.run(preflight("https://b.example")),
    )
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    assert "access-control-allow-origin" not in other.headers


def test_web_pages_do_not_manage_adapters(server):
    foreign = ("https://a.example", "null", "http://[", "")
    for origin, status in ((None, 200), (server.url, 200), *((each, 403) for each in foreign)):
        headers = {} if origin is None else {"Origin": origin}
        answer = httpx.get(f"{server.url}/v1/adapters", headers=headers)
        assert answer.status_code == status


@pytest.fixture
def page(server) -> dict:
    return create_app(server.state).openapi()


def resolved(page: dict, schema: dict) -> dict:
    return {**schema, "components": page["components"]}


def test_every_route_is_described_with_examples_answers_and_errors(page):
    routes = {(method, path) for path, methods in page["paths"].items() for method in methods}
    assert routes == DOCS.keys()
    for method, path in routes:
        operation = page["paths"][path][method]
        assert operation["summary"], path
        assert operation["description"], path
        assert operation["responses"], path
        if "requestBody" in operation:
            content = operation["requestBody"]["content"]["application/json"]
            jsonschema.validate(content["example"], resolved(page, content["schema"]))
        for status, response in operation["responses"].items():
            for content in response["content"].values():
                schema = resolved(page, content["schema"])
                jsonschema.Draft202012Validator.check_schema(schema)
                if status.startswith("2"):
                    jsonschema.validate(content["example"], schema)


def test_the_page_tells_the_truth_about_answers(server, page):
    """What is answered is what the page says."""
    schemas = {
        path: page["paths"][path]["post"]["responses"]
        for path in ("/v1/completions", "/v1/chat/completions")
    }
    chat = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
    for path, body in (("/v1/completions", ASK), ("/v1/chat/completions", chat)):
        for extra, status in (
            ({}, 200),
            ({"logprobs": 1} if "prompt" in body else {}, 200),
            ({"n": 0}, 400),
        ):
            answer = post(server, {**body, **extra}, path)
            assert answer.status_code == status
            schema = schemas[path][str(status)]["content"]["application/json"]["schema"]
            jsonschema.validate(answer.json(), resolved(page, schema))
