"""Every way in which one tenant could reach another's, and what it is answered.

``ATTEMPTS`` is the table of ``docs/tenants.md``. The tenant *globex* tries; *acme* has an adapter
it was given (``acme-v7``) and one that it uploaded (``private``). What must look as if it did not
exist is compared with what there really is not.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltamux.adapters.errors import AdapterCorrupt
from deltamux.server.composition import Composable
from deltamux.server.engine.messages import AdapterInfo
from deltamux.server.generation import Share
from deltamux.server.store.catalog import Catalog
from deltamux.server.store.entries import Adapter, Version
from deltamux.server.store.errors import UnknownAdapter, UnknownModel
from deltamux.server.store.names import full_name
from deltamux.server.tenants.directory import Account, Key
from deltamux.server.tenants.isolation import cache_salt
from deltamux.server.tenants.keys import hash_key
from deltamux.server.tenants.tenant import OPERATOR, Alias, Caller, Role, Tenant

from .fake_engine import Running, serving
from .fake_store import write_adapter
from .harness import EngineHarness, engine_config, make_request
from .hostile_archives import tar

PAGE = Path(__file__).parents[2] / "docs" / "tenants.md"
ACMES = ("acme-v7", "private")
NOTHING = "nothing"
MESSAGES = [{"role": "user", "content": "hi"}]
ACME = Tenant("acme", ("acme-*", "shared"), aliases={"bot": Alias((("acme-v7", 1.0),))})
GLOBEX = Tenant(
    "globex",
    ("shared", "*-none"),
    aliases={
        **{f"to-{name}": Alias(((name, 1.0),)) for name in (*ACMES, "acme/private", NOTHING)},
        "canary": Alias((("shared", 50.0), ("acme-v7", 50.0))),
    },
)
STOLEN = Tenant("thief", ("shared",), default="acme-v7")
EVERYTHING = Tenant("greedy", ("*",))
GONE = Tenant("gone", ("*",), disabled=True)


def account(tenant: Tenant, role: Role = Role.USER) -> Account:
    return Account(tenant, role, (Key(hash_key(f"key of {tenant.name}")),))


ACCOUNTS = [account(each) for each in (ACME, GLOBEX, STOLEN, EVERYTHING, GONE)]


def archive(label: str) -> bytes:
    return tar(
        (
            ("adapter_config.json", b'{"label": "%s"}' % label.encode()),
            ("adapter_model.safetensors", label.encode() * 10),
        )
    )


@dataclass
class World:
    server: Running
    stack: ExitStack

    def __post_init__(self) -> None:
        self.admin, self.acme, self.globex, self.thief, self.greedy, self.gone = (
            self._client(f"key of {name}")
            for name in ("ops", "acme", "globex", "thief", "greedy", "gone")
        )
        self.nobody = self._client(None)

    def _client(self, key: str | None) -> httpx.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        client = httpx.Client(base_url=self.server.url, headers=headers, timeout=20)
        return self.stack.enter_context(client)

    def digest(self, name: str) -> str:
        return self.acme.get(f"/v1/adapters/{name}").json()["digest"]


@pytest.fixture(scope="module")
def world(tokenizer, tmp_path_factory) -> Iterator[World]:
    ops = account(Tenant("ops"), Role.ADMIN)
    with serving(tokenizer, accounts=[ops, *ACCOUNTS]) as running, ExitStack() as stack:
        made = World(running, stack)
        engine = running.engine
        engine.reply = lambda asked: " ".join(engine.loaded[a.adapter_id] for a in asked.adapters)
        shelf = tmp_path_factory.mktemp("shelf")
        for name in ("acme-v7", "shared", "hidden"):
            body = {"name": name, "source": str(write_adapter(shelf / name, name))}
            assert made.admin.post("/v1/adapters", json=body).status_code == 201
        assert upload(made.acme, "private", "acme's own").status_code == 201
        yield made


@pytest.fixture(autouse=True)
def unchanged(world) -> Iterator[None]:
    """Whatever was tried, acme has what it had."""

    def acmes() -> list[tuple[str, str]]:
        data = world.acme.get("/v1/adapters").json()["data"]
        return [(each["name"], each["digest"]) for each in data]

    before = acmes()
    yield
    assert acmes() == before
    assert complete(world.acme, "private").status_code == 200


def upload(client: httpx.Client, name: str, label: str, **fields) -> httpx.Response:
    files = {"archive": ("a.tar.gz", archive(label))}
    return client.post("/v1/adapters", data={"name": name, **fields}, files=files)


def complete(client: httpx.Client, model: str, **fields) -> httpx.Response:
    body = {"model": model, "prompt": "x", "max_tokens": 30, **fields}
    return client.post("/v1/completions", json=body)


def ran_on(answer: httpx.Response) -> str:
    """What the adapter is that an answer was made with; empty for the base."""
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def seen(answer: httpx.Response, name: str) -> tuple[object, ...]:
    """All that an answer tells but the name that was asked for."""
    told = {"date", "content-length", "x-request-id"}
    headers = {key: value for key, value in answer.headers.items() if key not in told}
    return answer.status_code, headers, answer.text.replace(name, "NAME")


def as_if_nothing(world: World, status: int, ask: Callable[[httpx.Client, str], httpx.Response]):
    """Asking for acme's adapters is answered as asking for none; and reaches no engine."""
    before = len(world.server.engine.submitted)
    wanted = ask(world.globex, NOTHING)
    assert wanted.status_code == status
    for name in (*ACMES, "acme/private"):
        assert seen(ask(world.globex, name), name) == seen(wanted, NOTHING), name
    assert len(world.server.engine.submitted) == before


def forbidden(*answers: httpx.Response) -> None:
    for answer in answers:
        assert answer.status_code == 403
        assert "acme" not in answer.text


# Each row: the attempt, what it is answered, and the test.


def generate(world):
    as_if_nothing(world, 404, complete)
    chat = {"messages": MESSAGES}
    as_if_nothing(
        world, 404, lambda c, n: c.post("/v1/chat/completions", json={"model": n, **chat})
    )


def with_base(world):
    as_if_nothing(world, 404, lambda client, name: complete(client, f"base:{name}"))


def by_digest(world):
    digest = world.digest("acme-v7")
    as_if_nothing(world, 404, lambda client, name: complete(client, f"{name}@{digest}"))
    as_if_nothing(world, 404, lambda client, name: complete(client, f"base:{name}@{digest[:8]}"))


def compose(world):
    for others in ([], [{"name": "shared"}]):
        as_if_nothing(
            world,
            404,
            lambda client, name, others=others: complete(
                client, "base", adapters=[*others, {"name": name}]
            ),
        )


def alias(world):
    for name in (*ACMES, "acme/private"):
        refused, wanted = complete(world.globex, f"to-{name}"), complete(world.globex, "to-nothing")
        assert seen(refused, name) == seen(wanted, NOTHING)
        assert refused.status_code == 404
    assert complete(world.globex, "bot").status_code == 404


def canary(world):
    answers = [complete(world.globex, "canary", user=f"user {n}") for n in range(40)]
    assert {each.status_code for each in answers} == {200, 404}
    assert {ran_on(each) for each in answers if each.status_code == 200} == {"shared"}


def default(world):
    assert complete(world.thief, "base").status_code == 404
    assert complete(world.thief, "default").status_code == 404


def everything(world):
    listed = {each["name"] for each in world.greedy.get("/v1/adapters").json()["data"]}
    assert listed == {"acme-v7", "shared", "hidden"}
    assert complete(world.greedy, "private").status_code == 404
    assert complete(world.greedy, "acme/private").status_code == 404


def list_models(world):
    answer = world.globex.get("/v1/models")
    names = {each["id"] for each in answer.json()["data"]}
    assert names == {"base", "shared", "canary"} or names == {"base", "shared"}
    assert not any(each["root"].startswith("/") for each in answer.json()["data"])
    as_if_nothing(world, 404, lambda client, name: client.get(f"/v1/models/{name}"))


def list_adapters(world):
    answer = world.globex.get("/v1/adapters")
    assert [each["name"] for each in answer.json()["data"]] == ["shared"]
    assert "acme" not in answer.text
    paged = world.globex.get("/v1/adapters?after=acme-v&limit=1").json()
    assert ([each["name"] for each in paged["data"]], paged["has_more"]) == (["shared"], False)


def inspect(world):
    as_if_nothing(world, 404, lambda client, name: client.get(f"/v1/adapters/{name}"))


def tokenize(world):
    ask = {"prompt": "x"}
    as_if_nothing(world, 404, lambda c, n: c.post("/tokenize", json={"model": n, **ask}))
    ask = {"tokens": [5]}
    as_if_nothing(world, 404, lambda c, n: c.post("/detokenize", json={"model": n, **ask}))


def load(world):
    for body in ({"load_inplace": True}, {}):
        as_if_nothing(
            world,
            403,
            lambda client, name, body=body: client.post(
                "/v1/load_lora_adapter", json={"lora_name": name, "lora_path": "/etc", **body}
            ),
        )
    as_if_nothing(
        world, 403, lambda c, n: c.post("/v1/adapters", json={"name": n, "source": "/etc"})
    )


def unload(world):
    as_if_nothing(world, 404, lambda c, n: c.post("/v1/unload_lora_adapter", json={"lora_name": n}))
    as_if_nothing(world, 404, lambda client, name: client.delete(f"/v1/adapters/{name}"))


def change(world, body):
    as_if_nothing(world, 404, lambda c, n: c.patch(f"/v1/adapters/{n}", json=body))


def pin(world):
    change(world, {"pinned": True})


def roll_back(world):
    change(world, {"rollback": True})
    change(world, {"version": world.digest("acme-v7")})


def overwrite(world):
    for name in ACMES:
        assert upload(world.globex, name, "globex's own", replace=True).status_code == 201
        acmes = "acme's own" if name == "private" else name
        assert ran_on(complete(world.globex, name)) == "globex's own"
        assert ran_on(complete(world.acme, name)) == acmes
        assert world.globex.get(f"/v1/adapters/{name}").json()["owner"] == "globex"
        assert world.globex.delete(f"/v1/adapters/{name}").status_code == 200
    refused = upload(world.globex, "acme/private", "globex's own")
    assert seen(refused, "acme/private") == seen(
        upload(world.globex, "acme/nothing", "globex's own"), "acme/nothing"
    )
    assert refused.status_code == 400


def same_files(world):
    cards = [
        upload(world.globex, name, label).json()
        for name, label in (("same", "acme's own"), ("other", "nobody's"))
    ]
    for name in ("same", "other"):
        assert complete(world.globex, name).status_code == 200
        assert world.globex.delete(f"/v1/adapters/{name}").status_code == 200
    volatile = {"name", "digest", "versions", "info", "created"}
    same, other = ({k: v for k, v in card.items() if k not in volatile} for card in cards)
    assert same == other


def change_shared(world):
    forbidden(
        world.globex.delete("/v1/adapters/shared"),
        world.globex.patch("/v1/adapters/shared", json={"rollback": True}),
        world.globex.post("/v1/unload_lora_adapter", json={"lora_name": "shared"}),
    )


def watch_shared(world):
    before = world.globex.get("/v1/adapters/shared").json()
    assert complete(world.acme, "shared").status_code == 200
    assert world.globex.get("/v1/adapters/shared").json() == before
    assert not {"hits", "last_used", "path", "source", "pinned"} & before.keys()


def pin_own(world):
    assert upload(world.globex, "mine", "globex's own").status_code == 201
    forbidden(world.globex.patch("/v1/adapters/mine", json={"pinned": True}))
    assert world.globex.delete("/v1/adapters/mine").status_code == 200


def sagemaker(world):
    header = {"X-Amzn-SageMaker-Adapter-Identifier": "acme-v7"}
    body = {"model": "base", "prompt": "x"}
    assert ran_on(world.globex.post("/v1/completions", json=body, headers=header)) == ""
    body = {"name": "private", "src": "/etc"}
    assert world.globex.post("/adapters", json=body).status_code in (403, 404)
    assert world.globex.delete("/adapters/private").status_code in (403, 404, 405)


def usage(world):
    assert complete(world.acme, "private").status_code == 200
    [acmes_key] = [each.id for each in world.server.state.tenants.find("acme").keys]
    for query in ("", f"?key_id={acmes_key}", "?adapter=acme-v7", "?group_by=tenant"):
        lines = world.globex.get(f"/v1/usage{query}").json().get("data", [])
        assert {line["tenant"] for line in lines} <= {"globex"}
        assert acmes_key not in {line.get("key_id") for line in lines}
    asked, wanted = (world.globex.get(f"/v1/usage?tenant={each}") for each in ("acme", NOTHING))
    assert seen(asked, "acme") == seen(wanted, NOTHING)
    assert asked.status_code in (403, 501)


def metrics(world):
    forbidden(world.globex.get("/metrics"))
    assert world.nobody.get("/metrics").status_code == 401
    assert 'adapter_name="acme-v7"' in world.admin.get("/metrics").text


def tenants(world):
    for name in ("acme", "globex", "nothing"):
        path = f"/v1/tenants/{name}"
        forbidden(
            world.globex.get(path),
            world.globex.delete(path),
            world.globex.patch(path, json={"adapters": ["*"]}),
            world.globex.post(f"{path}/keys", json={}),
            world.globex.delete(f"{path}/keys/0123456789abcdef"),
        )
    forbidden(world.globex.get("/v1/tenants"))
    forbidden(world.globex.post("/v1/tenants", json={"name": "me", "role": "admin"}))


def abort(world):
    """Both requests have the same id and user; globex's leaves, and acme's goes on."""
    engine = world.server.engine
    body = {"model": "base", "prompt": "x", "stream": True, "user": "same"}

    async def begun(client: httpx.Client) -> "asyncio.Task[httpx.Response]":
        asking = asyncio.create_task(ask({**client.headers, "X-Request-Id": "same"}))
        assert await asyncio.to_thread(engine.on_stall.acquire, timeout=20)
        return asking

    async def ask(headers: dict[str, str]) -> httpx.Response:
        async with httpx.AsyncClient(headers=headers, timeout=20) as connection:
            return await connection.post(f"{world.server.url}/v1/completions", json=body)

    async def leave(asking: "asyncio.Task[httpx.Response]") -> None:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert await asyncio.to_thread(engine.on_abort.acquire, timeout=20)

    async def both() -> None:
        acmes = await begun(world.acme)
        of_acme = engine.submitted[-1].request_id
        await leave(await begun(world.globex))
        assert of_acme not in engine.aborted
        assert engine.submitted[-1].request_id in engine.aborted
        await leave(acmes)

    engine.stall_after = 1
    try:
        asyncio.run(both())
    finally:
        engine.stall_after = None


def salts_of(world, client: httpx.Client) -> set[str | None]:
    """Those of the engine's requests, for salts that a client might try."""
    tries = (None, "x", "acme", "tenant:acme:", "tenant:acme:x", "admin:", "shared:", ":")
    before = len(world.server.engine.submitted)
    for salt in tries:
        assert complete(client, "shared", cache_salt=salt).status_code == 200
    return {each.cache_salt for each in world.server.engine.submitted[before:]}


def cache(world):
    everybodys = [salts_of(world, each) for each in (world.acme, world.globex, world.greedy)]
    everybodys.append({cache_salt(Caller(None, Role.ADMIN, "id"), "tenant:acme:")})
    assert len(set.union(*everybodys)) == sum(map(len, everybodys))


def priority(world):
    assert complete(world.globex, "shared", priority=-(2**31) + 1).status_code == 200
    assert world.server.engine.submitted[-1].share == Share("globex", 1.0)


def errors(world):
    world.server.engine.bad_adapters["bad"] = AdapterCorrupt("acme's reason")
    assert "acme's reason" in upload(world.acme, "bad", "bad").text
    assert complete(world.acme, "bad").status_code == 404
    assert seen(complete(world.globex, "bad"), "bad") == seen(
        complete(world.globex, NOTHING), NOTHING
    )


def keys(world):
    [key] = world.admin.get("/v1/tenants/acme").json()["keys"]
    bad = ["Bearer wrong", f"Bearer {key['id']}", f"Bearer {hash_key('key of acme')}"]
    bad += ["Bearer", "Basic key of acme", "key of acme", "Bearer key of gone"]
    for header in bad:
        for path in ("/v1/models", "/v1/adapters", "/v1/nothing", "/metrics", "/openapi.json"):
            answer = world.nobody.get(path, headers={"Authorization": header})
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("AuthenticationError", 401)
            assert "gone" not in answer.text
    assert world.nobody.post("/v1/completions", content=b"{").status_code == 401
    assert world.nobody.get("/health").status_code == 200


@dataclass(frozen=True)
class Attempt:
    """A row of the table: what is tried, what the answer is, and the test of it."""

    what: str
    answer: str
    run: Callable[[World], None]


SAME = "404, word for word as for a name that nobody has"
ATTEMPTS = [
    Attempt("use another's adapter, in completions and chat", SAME, generate),
    Attempt("the same as `base:name`", SAME, with_base),
    Attempt("the same as `name@digest`, with its true digest", SAME, by_digest),
    Attempt("the same in `adapters: [...]`, alone or beside an own one", SAME, compose),
    Attempt("an alias of its own that names another's adapter; another's alias", SAME, alias),
    Attempt(
        "a canary of its own, one target of which is another's adapter",
        f"its own target's part is served; the rest {SAME}",
        canary,
    ),
    Attempt("a default that is another's adapter", SAME, default),
    Attempt("the pattern `*`", "the server's adapters, never what a tenant uploaded", everything),
    Attempt("find another's adapter in `/v1/models`", f"absent; by name {SAME}", list_models),
    Attempt("find it in `/v1/adapters`, by pages too", "absent", list_adapters),
    Attempt("inspect it", SAME, inspect),
    Attempt("`/tokenize` and `/detokenize` with it", SAME, tokenize),
    Attempt("load under its name from a path of the server", "403, for any name", load),
    Attempt("unload or delete it", SAME, unload),
    Attempt("pin it", SAME, pin),
    Attempt("roll it back, set its default version", SAME, roll_back),
    Attempt(
        "overwrite it by an upload of its name, or as `acme/name`",
        "201, an adapter of its own; the other stays. As `acme/name` 400, for any name",
        overwrite,
    ),
    Attempt(
        "upload the very files of another's adapter, then delete them",
        "201 and 200, as for files that nobody has; the other stays",
        same_files,
    ),
    Attempt("change an adapter that it shares with others", "403", change_shared),
    Attempt(
        "watch others' use of a shared adapter",
        "hits, last use and place in memory are not told",
        watch_shared,
    ),
    Attempt("pin an adapter of its own, at others' cost", "403", pin_own),
    Attempt("SageMaker's adapter header and routes", "the header is ignored; 403, 404", sagemaker),
    Attempt("read another's usage", "its own at most; by name 403, for any name", usage),
    Attempt("read `/metrics`", "403", metrics),
    Attempt("read or change tenants and keys, its own too", "403, for any name", tenants),
    Attempt("end another's request with its `X-Request-Id` and `user`", "it goes on", abort),
    Attempt(
        "find another's prompt in the prefix cache, with any `cache_salt`",
        "never a hit: `cached_tokens` is 0",
        cache,
    ),
    Attempt("run before others by `priority`", "it orders its own share only", priority),
    Attempt("read another's errors", SAME, errors),
    Attempt("ask with a wrong key, a key's id or hash, or a disabled tenant's key", "401", keys),
]


@pytest.mark.parametrize("attempt", ATTEMPTS, ids=lambda each: each.what)
def test_a_tenant_reaches_no_other(attempt, world):
    attempt.run(world)


def render() -> str:
    """The table; ``python -m tests.server.test_isolation`` prints it."""
    rows = [f"| {each.what} | {each.answer} |" for each in ATTEMPTS]
    return "\n".join(["| a tenant tries to | and gets |", "|---|---|", *rows])


def test_the_page_has_the_table_that_is_tested():
    assert render() in PAGE.read_text(encoding="utf-8")


NAMES = ("a", "ab", "b", "base", "default")
OWNERS = (None, "acme", "globex")
PATTERNS = ("a", "a*", "*", "*/*", "acme/*", "acme/a", "[!a]", "none")
names = st.sampled_from(NAMES[:3])


@st.composite
def full_adapters(draw) -> Adapter:
    owner, name = draw(st.sampled_from(OWNERS)), draw(names)
    digests = draw(st.lists(st.sampled_from(("a" * 64, "b" * 64)), max_size=2, unique=True))
    info = AdapterInfo("", "lora", "peft", 8, 1, 1, ["q_proj"], Composable())
    versions = [Version(each, "", "", "", True, 1, info, 0.0) for each in digests]
    default = digests[0] if digests else None
    full = full_name(name, owner)
    return Adapter(full, "", "", 0, default, tuple(versions), owner=owner)


@st.composite
def some_tenants(draw) -> Tenant:
    targets = st.sampled_from((*NAMES, "acme/a", "a@b", "base:a", "globex/b@a"))
    weights = st.dictionaries(targets, st.just(1.0), min_size=1, max_size=2)
    aliases = draw(st.dictionaries(st.sampled_from(("x", "a", "ab")), weights, max_size=2))
    return Tenant(
        draw(st.sampled_from(("acme", "globex"))),
        tuple(draw(st.lists(st.sampled_from(PATTERNS), max_size=2))),
        draw(st.none() | targets),
        {name: Alias(tuple(each.items())) for name, each in aliases.items()},
    )


def told(catalog: Catalog, tenant: Tenant) -> list[object]:
    """All that a tenant can get out of a catalogue by asking for names."""
    caller = Caller(tenant, Role.USER, "id")
    answers: list[object] = [catalog.visible(caller)]
    plain = [*NAMES, "x", "acme/a", "globex/b"]
    for name in plain:
        for model in (name, f"base:{name}", f"{name}@a", f"base:{name}@b", f"{name}@"):
            try:
                answers.append(catalog.resolve(model, caller, "user"))
            except UnknownModel as error:
                answers.append(str(error))
        try:
            answers.append(catalog.look_up(name, caller))
        except UnknownAdapter as error:
            answers.append(str(error))
    return answers


def of(*adapters: Adapter) -> Catalog:
    catalog = Catalog("base")
    for each in adapters:
        catalog.put(each)
    return catalog


@given(st.lists(full_adapters(), max_size=6, unique_by=lambda each: each.name), some_tenants())
@settings(max_examples=80, deadline=None)
def test_whatever_is_asked_is_answered_as_if_others_adapters_did_not_exist(adapters, tenant):
    def may_use(adapter: Adapter) -> bool:
        if adapter.owner is not None:
            return adapter.owner == tenant.name
        return any(fnmatchcase(adapter.name, each) for each in tenant.adapters)

    visible = [each for each in adapters if may_use(each)]
    answers = told(of(*adapters), tenant)
    assert answers == told(of(*visible), tenant)
    assert all(each in visible for each in answers[0])


def test_cached_tokens_tell_nothing_of_another_tenants_prompt(tiny_model):
    """On a real engine: what acme sent is a hit for acme alone, or among those who share."""
    engine = EngineHarness(engine_config(tiny_model("llama")))
    prompt = list(range(40, 80))
    sharing = [Caller(Tenant(name, shares_cache=True), Role.USER, "id") for name in "ab"]
    own = [Caller(tenant, Role.USER, "id") for tenant in (ACME, GLOBEX)]
    admin = Caller(None, Role.ADMIN, "id")

    def cached(caller: Caller, salt: str | None = None) -> int:
        name = f"request {len(engine.received)}"
        engine.submit(make_request(name, prompt, cache_salt=cache_salt(caller, salt)))
        return engine.run()[name].num_cached_tokens

    try:
        assert [cached(own[0]), cached(own[0]) > 0] == [0, True]
        for salt in (None, "tenant:acme:", "tenant:acme", "acme"):
            assert cached(own[1], salt) == 0
        assert [cached(sharing[0]), cached(sharing[1]) > 0] == [0, True]
        assert cached(admin, "tenant:acme:") == cached(admin, "shared:") == 0
        assert cached(OPERATOR) == 0
    finally:
        engine.close()


if __name__ == "__main__":
    print(render())  # noqa: T201
