"""Tenants: the file, keys, what names mean, management over HTTP and by the command."""

import asyncio
import hashlib
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path

import httpx
import openai
import pytest
from click.testing import CliRunner

from deltamux.server.cli import cli
from deltamux.server.state.database import open_database, write_address
from deltamux.server.tenants.admin import TenantAdmin
from deltamux.server.tenants.directory import Account, Key, TenantDirectory
from deltamux.server.tenants.errors import KeyRefused, TenantsRefused
from deltamux.server.tenants.file import TenantsFile, read_tenants
from deltamux.server.tenants.keys import hash_key
from deltamux.server.tenants.records import TenantRecords
from deltamux.server.tenants.routing import draw, meaning, permits
from deltamux.server.tenants.settings import LimitsForm, NewTenant, TenantChange, TenantSettings
from deltamux.server.tenants.tenant import OPERATOR, Alias, Role, Tenant, TenantLimits

from .fake_engine import Running, serving
from .fake_store import write_adapter
from .hostile_archives import GOOD, packed
from .running import running_server
from .siege import eventually

HASH = "sha256:" + "a" * 64
OTHER = "sha256:" + "b" * 64
CONTRACT = f"""
admin_keys: ["{OTHER}"]
tenants:
  - name: acme
    keys: ["{HASH}"]
    adapters: ["acme-*", "shared-summarizer"]
    default: acme-v7
    aliases: {{support-bot: acme-v7, chat: {{acme-v7: 90, acme-v8: 10}}}}
    weight: 2
    limits:
      {{requests_per_minute: 600, tokens_per_minute: 200000, concurrency: 16, max_tokens: 1024}}
"""


def test_the_file_of_the_contract(tmp_path):
    path = tmp_path / "tenants.yaml"
    path.write_text(CONTRACT)
    admin, acme = read_tenants(path)
    assert (admin.role, admin.keys) == (Role.ADMIN, (Key(OTHER),))
    assert acme.keys == (Key(HASH),)
    assert acme.tenant == Tenant(
        name="acme",
        adapters=("acme-*", "shared-summarizer"),
        default="acme-v7",
        aliases={
            "support-bot": Alias((("acme-v7", 1.0),)),
            "chat": Alias((("acme-v7", 90.0), ("acme-v8", 10.0))),
        },
        weight=2,
        limits=TenantLimits(600, 200000, 16, max_tokens=1024),
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nope: 1", "nope: unknown key"),
        ("tenants: [{name: a, limits: {concurency: 1}}]", r"tenants[0].limits.concurency: unknown"),
        ("tenants: [{name: a, limits: {queue: 0}}]", "tenants[0].limits.queue: Input should be"),
        ("tenants: [{name: a}, {nom: b}]", "tenants[1].name: Field required"),
        ("tenants: [{name: a/b}]", "tenants[0].name: String should match"),
        ("tenants: [{name: a}, {name: a}]", "two tenants have the name 'a'"),
        ("tenants: [{name: a, keys: [secret]}]", "tenants[0].keys[0]: String should match"),
        ("tenants: [{name: a, weight: 0}]", "tenants[0].weight: Input should be greater"),
        ("tenants: [{name: a, weight: yes}]", "tenants[0].weight: Input should be a valid number"),
        ("tenants: [{name: a, aliases: {x: {}}}]", "tenants[0].aliases.x: Dictionary should have"),
        ("tenants: [{name: a, aliases: {x: {v: -1}}}]", "tenants[0].aliases.x.v: Input should be"),
        ("tenants: [{name: a, aliases: {default: v}}]", "'default' is no alias"),
        ("tenants: [{name: a, name: b}]", "the key 'name' is there twice"),
        ("tenants: {name: a}", "tenants: Input should be a valid list"),
        ("- a", "top level: Input should be a valid dictionary"),
        ("tenants: [", "tenants file"),
        ("tenants: '\udcff'", "tenants file"),
    ],
)
def test_a_wrong_file_is_refused_by_its_place(tmp_path, text, says):
    path = tmp_path / "tenants.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(TenantsRefused, match="tenants file") as refused:
        read_tenants(path)
    assert says in str(refused.value)


def test_the_forms_have_what_tenants_have():
    limits = {each.name: number for number, each in enumerate(fields(TenantLimits), 1)}
    assert LimitsForm(**limits).model_dump() == limits
    tenant = Tenant("a", ("x",), "y", {"z": Alias((("x", 2.0),))}, 3.0, TenantLimits(4), True)
    assert TenantSettings.of(tenant).tenant("a") == tenant


def test_a_file_is_followed_and_a_wrong_one_changes_nothing(tmp_path, caplog):
    path = tmp_path / "tenants.yaml"
    path.write_text(f"tenants: [{{name: a, keys: ['{hash_key('one')}']}}]")

    async def until(key: str, good: bool) -> None:
        while _is_good(directory, key) is not good:
            await asyncio.sleep(0.01)

    async def follow() -> None:
        following = asyncio.create_task(file.follow())
        text = f"tenants: [{{name: a, keys: ['{hash_key('two')}']}}]"
        path.with_name("new").write_text(text)
        path.with_name("new").rename(path)
        await asyncio.wait_for(until("two", True), 20)
        path.write_text("tenants: [{nom: a}]")
        while "stay as they were" not in caplog.text:
            await asyncio.sleep(0.01)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)

    directory = TenantDirectory()
    file = TenantsFile(path, directory, every=0.2)
    file.load()
    assert _is_good(directory, "one")
    asyncio.run(follow())
    assert _is_good(directory, "two")
    assert not _is_good(directory, "one")
    assert "tenants[0]." in caplog.text


def _is_good(directory: TenantDirectory, key: str | None) -> bool:
    try:
        directory.caller(key)
    except KeyRefused:
        return False
    return True


def test_a_key_is_kept_as_its_plain_hash():
    assert hash_key("key") == "sha256:" + hashlib.sha256(b"key").hexdigest()


def test_a_server_is_open_until_it_has_tenants_and_never_again():
    directory = TenantDirectory()
    assert directory.caller(None) == directory.caller("anything") == OPERATOR
    directory.use_database([Account(Tenant("a"))])
    directory.use_database([])
    assert not directory.is_open
    assert not _is_good(directory, None)
    empty = TenantDirectory()
    empty.use_file([])
    assert not _is_good(empty, None)


def test_keys_end_when_they_expire_and_with_their_tenant():
    now = [100.0]
    directory = TenantDirectory(lambda: now[0])
    tenant = Tenant("a")
    account = Account(tenant, keys=(Key(hash_key("old"), 150.0), Key(hash_key("new"))))
    directory.use_database([account])
    assert directory.caller("old").tenant is tenant
    assert directory.caller("old").key_id == hash_key("old")[7:23]
    now[0] = 150.0
    assert (_is_good(directory, "old"), _is_good(directory, "new")) == (False, True)
    directory.use_database([replace(account, tenant=replace(tenant, disabled=True))])
    assert not _is_good(directory, "new")


def test_a_name_or_key_in_both_places_is_refused_and_changes_nothing():
    directory = TenantDirectory()
    one = Account(Tenant("a"), keys=(Key(hash_key("one")),))
    directory.use_file([one])
    with pytest.raises(TenantsRefused, match="'a' is in the tenants file and in the database"):
        directory.use_database([Account(Tenant("a"))])
    with pytest.raises(TenantsRefused, match="same key"):
        directory.use_database([Account(Tenant("b"), keys=one.keys)])
    assert directory.all() == [one]


@pytest.mark.parametrize(
    ("model", "meant"),
    [
        ("base", "bot"),
        ("default", "bot"),
        ("v7", "v7"),
        ("base:v7", "base:v7"),
        ("v7@ab", "v7@ab"),
        ("pinned", "v7@ab"),
        ("base:pinned", "v7@ab"),
        ("pinned@cd", "pinned@cd"),
        ("plain", "base"),
        ("base:default", "base:default"),
        ("loop", "pinned"),
    ],
)
def test_what_names_mean(model, meant):
    names = {"pinned": "v7@ab", "plain": "base", "loop": "pinned"}
    aliases = {name: Alias(((target, 1.0),)) for name, target in names.items()}
    tenant = Tenant("t", default="bot", aliases=aliases)
    assert meaning(model, tenant, "base", "") == meant
    by_alias = replace(tenant, default="pinned")
    assert meaning("base", by_alias, "base", "") == "v7@ab"
    assert meaning("default", replace(tenant, default=None), "base", "") == "base"


@pytest.mark.parametrize(
    ("pattern", "name", "may"),
    [
        ("a-*", "a-1", True),
        ("a-*", "b-1", False),
        ("a", "a1", False),
        ("*", "x", True),
        ("*", "other/x", False),
        ("other/*", "other/x", False),
        ("A", "a", False),
        ("[ab]?", "b2", True),
    ],
)
def test_patterns(pattern, name, may):
    assert permits(Tenant("t", (pattern,)), name) is may


def test_a_canary_gets_its_part_and_keeps_its_users():
    users = [f"acme/chat/user {number}" for number in range(4000)]

    def on(weight: float) -> dict[str, str]:
        alias = Alias((("old", 100.0 - weight), ("new", weight)))
        return {user: draw(alias, user) for user in users}

    tenth, half = on(10), on(50)
    assert tenth == on(10)
    assert Counter(tenth.values())["new"] == pytest.approx(400, abs=80)
    assert Counter(half.values())["new"] == pytest.approx(2000, abs=160)
    assert all(half[user] == "new" for user in users if tenth[user] == "new")
    assert {draw(Alias((("only", 0.1),)), user) for user in users} == {"only"}


class Managed:
    """A server, and those who call it."""

    def __init__(self, server: Running, stack: ExitStack) -> None:
        self.server = server
        self._stack = stack
        self.operator = self.client()

    def client(self, key: str | None = None) -> httpx.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        made = httpx.Client(base_url=self.server.url, headers=headers, timeout=20)
        return self._stack.enter_context(made)

    def new_admin(self) -> httpx.Client:
        """Which closes the server."""
        body = {"name": "ops", "role": "admin"}
        return self.client(answered(self.operator.post("/v1/tenants", json=body), 201)["key"])

    def load(self, admin: httpx.Client, folder: Path, *labels: str, name: str = "") -> list[str]:
        """Digests of adapters, under their labels or as versions of one name."""
        bodies = [
            {"name": name or each, "source": str(write_adapter(folder / each, each))}
            for each in labels
        ]
        cards = [admin.post("/v1/adapters", json={**each, "replace": True}) for each in bodies]
        return [answered(each, 201)["digest"] for each in cards]


def answered(answer: httpx.Response, status: int) -> dict:
    assert answer.status_code == status, answer.text
    return answer.json()


@pytest.fixture
def managed(tokenizer) -> Iterator[Managed]:
    with serving(tokenizer) as running, ExitStack() as stack:
        engine = running.engine
        engine.reply = lambda asked: " ".join(engine.loaded[a.adapter_id] for a in asked.adapters)
        yield Managed(running, stack)


def ran_on(asker: httpx.Client, model: str, **fields) -> str:
    body = {"model": model, "prompt": "x", "max_tokens": 30, **fields}
    answer = answered(asker.post("/v1/completions", json=body), 200)
    assert answer["model"] == model
    return answer["choices"][0]["text"]


def test_an_open_server_takes_an_administrator_before_tenants(managed):
    refused = answered(managed.operator.post("/v1/tenants", json={"name": "acme"}), 400)
    assert "Make an administrator first" in refused["error"]["message"]
    assert managed.operator.get("/v1/models").status_code == 200
    admin = managed.new_admin()
    assert managed.operator.get("/v1/models").status_code == 401
    assert answered(admin.get("/v1/models"), 200)
    for change in (
        admin.delete("/v1/tenants/ops"),
        admin.patch("/v1/tenants/ops", json={"disabled": True}),
        admin.delete(
            f"/v1/tenants/ops/keys/{admin.get('/v1/tenants/ops').json()['keys'][0]['id']}"
        ),
    ):
        assert "Nobody could manage" in answered(change, 400)["error"]["message"]
    refused = answered(admin.patch("/v1/tenants/ops", json={"weight": 2}), 400)
    assert "takes no settings" in refused["error"]["message"]


def test_an_open_server_is_managed_from_its_machine_alone(managed):
    body = {"name": "ops", "role": "admin"}
    for headers in ({"host": "example.org"}, {"x-forwarded-for": "::1"}, {"origin": "http://x"}):
        assert managed.operator.post("/v1/tenants", json=body, headers=headers).status_code == 403
    admin = managed.new_admin()
    far = {"host": "example.org", "x-forwarded-for": "10.0.0.1"}
    assert admin.get("/v1/tenants", headers=far).status_code == 200


def test_tenants_are_made_changed_disabled_and_removed(managed):
    admin = managed.new_admin()
    body = {"name": "acme", "adapters": ["a-*"], "limits": {"queue": 3}, "aliases": {"x": "a-1"}}
    made = answered(admin.post("/v1/tenants", json=body), 201)
    acme = managed.client(made.pop("key"))
    assert made == answered(admin.get("/v1/tenants/acme"), 200)
    assert (made["origin"], made["adapters"], made["aliases"]) == (
        "database",
        ["a-*"],
        {"x": {"a-1": 1.0}},
    )
    assert acme.get("/v1/models").status_code == 200
    again = admin.post("/v1/tenants", json=body)
    assert "is taken" in answered(again, 400)["error"]["message"]
    change = {"limits": {"concurrency": 5}, "weight": 3}
    card = answered(admin.patch("/v1/tenants/acme", json=change), 200)
    assert (card["limits"]["queue"], card["limits"]["concurrency"], card["weight"]) == (3, 5, 3)
    assert card["adapters"] == ["a-*"]
    cleared = answered(admin.patch("/v1/tenants/acme", json={"limits": {"queue": None}}), 200)
    assert (cleared["limits"]["queue"], cleared["limits"]["concurrency"]) == (None, 5)
    answered(admin.patch("/v1/tenants/acme", json={"disabled": True}), 200)
    assert acme.get("/v1/models").status_code == 401
    answered(admin.patch("/v1/tenants/acme", json={"disabled": False}), 200)
    assert acme.get("/v1/models").status_code == 200
    answered(admin.delete("/v1/tenants/acme"), 200)
    assert acme.get("/v1/models").status_code == 401
    for gone in (admin.get, admin.delete):
        answered(gone("/v1/tenants/acme"), 404)
    assert [each["name"] for each in admin.get("/v1/tenants").json()["data"]] == ["ops"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "name"),
        ({"name": "a/b"}, "name"),
        ({"name": "a", "nope": 1}, "nope"),
        ({"name": "a", "role": "root"}, "role"),
        ({"name": "a", "limits": {"nope": 1}}, "limits"),
        ({"name": "a", "aliases": {"x": {"y": 0}}}, "aliases"),
        ({"name": "a", "weight": "2"}, "weight"),
    ],
)
def test_a_wrong_tenant_is_refused_by_field(managed, body, param):
    answer = answered(managed.operator.post("/v1/tenants", json=body), 400)
    assert answer["error"]["param"] == param
    assert managed.server.state.tenants.is_open


def test_keys_are_added_rotated_and_deleted(managed):
    admin = managed.new_admin()
    first = managed.client(admin.post("/v1/tenants", json={"name": "a"}).json()["key"])

    def new_key(**body) -> tuple[httpx.Client, str]:
        made = answered(admin.post("/v1/tenants/a/keys", json=body), 201)
        return managed.client(made["key"]), made["id"]

    second, second_id = new_key()
    assert first.get("/v1/models").status_code == second.get("/v1/models").status_code == 200
    third, _ = new_key(overlap_seconds=3600)
    keys = admin.get("/v1/tenants/a").json()["keys"]
    assert [each["expires"] is None for each in keys] == [False, False, True]
    assert first.get("/v1/models").status_code == 200
    answered(admin.delete(f"/v1/tenants/a/keys/{second_id}"), 200)
    assert second.get("/v1/models").status_code == 401
    answered(admin.delete(f"/v1/tenants/a/keys/{second_id}"), 404)
    fourth, _ = new_key(overlap_seconds=0)
    good = [each.get("/v1/models").status_code for each in (first, third, fourth)]
    assert good == [401, 401, 200]
    assert "sk-" not in admin.get("/v1/tenants").text


def test_a_removed_tenants_adapters_are_not_the_next_ones(managed):
    admin = managed.new_admin()

    def acme() -> httpx.Client:
        return managed.client(admin.post("/v1/tenants", json={"name": "acme"}).json()["key"])

    first = acme()
    files = {"archive": ("a.zip", packed(GOOD))}
    answered(first.post("/v1/adapters", data={"name": "mine"}, files=files), 201)
    assert ran_on(first, "mine") == ran_on(admin, "acme/mine") == "archived"
    assert admin.get("/v1/adapters/acme/mine").json()["owner"] == "acme"
    answered(admin.delete("/v1/tenants/acme"), 200)
    assert acme().get("/v1/adapters").json()["data"] == []
    assert admin.get("/v1/adapters").json()["data"] == []


def test_a_name_is_not_given_to_a_new_tenant_while_adapters_of_an_earlier_one_are_there(tokenizer):
    ops = Account(Tenant("ops"), Role.ADMIN, (Key(hash_key("ops")),))
    acme = Account(Tenant("acme"), keys=(Key(hash_key("acme")),))
    with serving(tokenizer, accounts=[ops, acme]) as server, ExitStack() as stack:
        managed = Managed(server, stack)
        files = {"archive": ("a.zip", packed(GOOD))}
        upload = managed.client("acme").post("/v1/adapters", data={"name": "mine"}, files=files)
        answered(upload, 201)
        server.state.tenants.use_file([ops])
        admin = managed.client("ops")
        refused = answered(admin.post("/v1/tenants", json={"name": "acme"}), 400)
        assert "remove 'acme/mine' first" in refused["error"]["message"]
        answered(admin.delete("/v1/adapters/acme/mine"), 200)
        answered(admin.post("/v1/tenants", json={"name": "acme"}), 201)


def test_own_adapters_are_bounded_in_number_and_bytes(managed):
    admin = managed.new_admin()
    body = {"name": "acme", "limits": {"adapters": 2}}
    acme = managed.client(answered(admin.post("/v1/tenants", json=body), 201)["key"])

    def upload(name: str, weights: bytes, status: int, **fields: str) -> dict:
        content = packed((GOOD[0], ("adapter_model.safetensors", weights)))
        files = {"archive": ("a.zip", content)}
        answer = acme.post("/v1/adapters", data={"name": name, **fields}, files=files)
        return answered(answer, status)

    upload("one", b"1" * 500, 201)
    upload("two", b"1" * 500, 201)
    assert "You may have 2 adapters" in upload("three", b"3" * 500, 403)["error"]["message"]
    size = len(GOOD[0][1]) + 500
    limits = {"adapters": None, "adapter_bytes": 2 * size}
    answered(admin.patch("/v1/tenants/acme", json={"limits": limits}), 200)
    upload("three", b"1" * 500, 201)  # files that it has already take no room
    upload("two", b"2" * 500, 201, replace="true")
    refused = upload("two", b"3" * 500, 403, replace="true")
    assert f"would take {3 * size} bytes" in refused["error"]["message"]
    assert len(acme.get("/v1/adapters/two").json()["versions"]) == 2
    contents = managed.server.state_dir / "adapters" / "contents"
    eventually(lambda: len(list(contents.iterdir())) == 2)
    answered(acme.delete("/v1/adapters/two"), 200)
    upload("four", b"3" * 500, 201)


def test_what_a_tenant_uploads_may_not_hide_the_base(managed):
    admin = managed.new_admin()
    acme = managed.client(admin.post("/v1/tenants", json={"name": "acme"}).json()["key"])
    for name in ("base", "default"):
        files = {"archive": ("a.zip", packed(GOOD))}
        refused = acme.post("/v1/adapters", data={"name": name}, files=files)
        assert "stands for the base" in answered(refused, 400)["error"]["message"]


def test_routing_over_http(managed, tmp_path):
    admin = managed.new_admin()
    managed.load(admin, tmp_path, "a-1", "a-2", "b-1")
    old, _ = managed.load(admin, tmp_path, "old", "new", name="a-v")
    body = {
        "name": "acme",
        "adapters": ["a-*"],
        "default": "bot",
        "aliases": {
            "bot": "a-1",
            "canary": {"a-1": 50, "a-2": 50},
            "versions": {"a-v": 50, f"a-v@{old[:12]}": 50},
            "plain": "base",
            "broken": "b-1",
        },
    }
    acme = managed.client(answered(admin.post("/v1/tenants", json=body), 201)["key"])
    assert ran_on(acme, "base") == ran_on(acme, "default") == ran_on(acme, "bot") == "a-1"
    assert ran_on(acme, "base:bot") == ran_on(acme, "base:a-1") == "a-1"
    assert ran_on(acme, "plain") == ran_on(admin, "base") == ""
    assert ran_on(acme, f"a-v@{old[:8]}") == "old"
    both = [{"name": "a-1"}, {"name": "a-2", "weight": 0.5}]
    assert (
        ran_on(acme, "base", adapters=both) == ran_on(acme, "default", adapters=both) == "a-1 a-2"
    )
    for name in ("canary", "versions"):
        by_user = {user: ran_on(acme, name, user=user) for user in "abcdef"}
        assert len(set(by_user.values())) == 2
        assert by_user == {user: ran_on(acme, name, user=user) for user in by_user}
        acme.headers["X-Request-Id"] = "one"
        without_user = {ran_on(acme, name)}
        for request_id in "abcde":
            acme.headers["X-Request-Id"] = request_id
            without_user.add(ran_on(acme, name))
        assert len(without_user) == 2
    listed = [each["id"] for each in acme.get("/v1/models").json()["data"]]
    assert listed == ["base", "a-1", "a-2", "a-v", "bot", "canary", "plain", "versions"]
    for name in listed:
        assert acme.get(f"/v1/models/{name}").json()["id"] == name
    answered(admin.patch("/v1/tenants/acme", json={"aliases": {"bot": "a-2"}}), 200)
    assert ran_on(acme, "base") == "a-2"
    assert acme.get("/v1/models/canary").status_code == 404


def test_tenants_survive_a_restart(tmp_path):
    new = NewTenant(name="acme", aliases={"x": {"a": 1, "b": 2.5}}, limits={"queue": 2})
    with open_database(tmp_path) as database:
        admin = TenantAdmin(TenantRecords(database), TenantDirectory(), keeps_admin=False)
        made, key = asyncio.run(admin.create(new))
    with open_database(tmp_path) as database:
        directory = TenantDirectory()
        TenantAdmin(TenantRecords(database), directory)
    assert directory.caller(key).tenant == made.tenant
    raw = (tmp_path / "deltamux.sqlite").read_bytes()
    assert hash_key(key).encode() in raw
    assert key.encode() not in raw


def test_a_change_whose_client_goes_away_is_in_force_before_the_next(tmp_path):
    async def go_away(admin: TenantAdmin) -> None:
        _, key = await admin.create(NewTenant(name="acme"))
        disabling = asyncio.create_task(admin.change("acme", TenantChange(disabled=True)))
        await asyncio.sleep(0)
        disabling.cancel()
        await asyncio.gather(disabling, return_exceptions=True)
        _, second = await admin.add_key("acme", None)
        assert not _is_good(admin.directory, key)
        assert not _is_good(admin.directory, second)

    with open_database(tmp_path) as database:
        admin = TenantAdmin(TenantRecords(database), TenantDirectory(), keeps_admin=False)
        asyncio.run(go_away(admin))
        assert TenantRecords(database).load() == admin.directory.all()


def test_openais_client_understands_the_refusals(managed):
    admin = managed.new_admin()
    key = admin.post("/v1/tenants", json={"name": "acme"}).json()["key"]
    url = f"{managed.server.url}/v1"
    with openai.OpenAI(base_url=url, api_key=key, max_retries=0) as acme:
        assert acme.completions.create(model="base", prompt="x").choices
        with pytest.raises(openai.NotFoundError):
            acme.completions.create(model="hidden", prompt="x")
    with openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as nobody:
        with pytest.raises(openai.AuthenticationError, match="not valid") as refused:
            nobody.completions.create(model="base", prompt="x", stream=True)
        assert (refused.value.status_code, refused.value.type) == (401, "AuthenticationError")


def test_what_stands_in_the_file_is_changed_there(tokenizer):
    of_file = [
        Account(Tenant("ops"), Role.ADMIN, (Key(hash_key("ops")),)),
        Account(Tenant("acme")),
    ]
    with serving(tokenizer, accounts=of_file) as server:
        headers = {"Authorization": "Bearer ops"}
        with httpx.Client(base_url=server.url, headers=headers) as admin:
            for change in (
                admin.patch("/v1/tenants/acme", json={"weight": 2}),
                admin.delete("/v1/tenants/acme"),
                admin.post("/v1/tenants/acme/keys", json={}),
            ):
                assert "tenants file" in answered(change, 400)["error"]["message"]
            assert answered(admin.get("/v1/tenants/acme"), 200)["origin"] == "file"
            assert answered(admin.post("/v1/tenants", json={"name": "b"}), 201)["key"]


def deltamux(*arguments: str, **env: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, ["tenants", *arguments], env=env)
    return result.exit_code, result.stdout.strip(), result.stderr


def test_the_command_on_a_stopped_servers_database(tmp_path):
    place = ("--state-dir", str(tmp_path))
    code, key, _ = deltamux(
        *(*place, "create", "acme", "--adapter", "a-*", "--alias", "x=v7:90,v8:10"),
        *("--default", "v7", "--weight", "2", "--limit", "queue=3", "--shares-cache"),
    )
    assert code == 0
    assert _stored(tmp_path).caller(key).tenant == Tenant(
        "acme",
        ("a-*",),
        "v7",
        {"x": Alias((("v7", 90.0), ("v8", 10.0)))},
        2,
        TenantLimits(queue=3),
        shares_cache=True,
    )
    _, second, _ = deltamux(*place, "rotate", "acme", "--overlap", "24h")
    assert _is_good(_stored(tmp_path), key)
    _, third, _ = deltamux(*place, "rotate", "acme")
    good = [_is_good(_stored(tmp_path), each) for each in (key, second, third)]
    assert good == [False, False, True]
    deltamux(*place, "create", "ops", "--role", "admin")
    assert deltamux(*place, "disable", "acme")[0] == 0
    assert not _is_good(_stored(tmp_path), third)
    _, listed, _ = deltamux(*place, "list")
    assert [line.split()[:3] for line in listed.splitlines()] == [
        ["acme", "user", "disabled"],
        ["ops", "admin", "enabled"],
    ]
    deltamux(*place, "enable", "acme")
    assert _is_good(_stored(tmp_path), third)


def _stored(state_dir: Path) -> TenantDirectory:
    with open_database(state_dir) as database:
        directory = TenantDirectory()
        directory.use_database(TenantRecords(database).load())
        return directory


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["create", "a/b"], "tenant: name: String should match"),
        (["create", "a", "--limit", "nope=1"], "tenant: limits.nope: unknown key"),
        (["create", "a", "--limit", "queue"], "'queue' is not NAME=N"),
        (["create", "a", "--alias", "x"], "'x' is not NAME=ADAPTER"),
        (["create", "a", "--alias", "x=y:z"], "'x=y:z' is not NAME=ADAPTER"),
        (["create", "a", "--role", "admin", "--weight", "2"], "takes no settings"),
        (["rotate", "nobody"], "There is no tenant 'nobody'"),
        (["rotate", "nobody", "--overlap", "1 day"], "is no duration"),
        (["disable", "nobody"], "There is no tenant 'nobody'"),
    ],
)
def test_the_command_refuses_by_name(tmp_path, arguments, says):
    code, _, error = deltamux("--state-dir", str(tmp_path), *arguments)
    assert (code, says in error) == (2, True), error


def test_the_command_asks_a_running_server(managed):
    """Whose state folder it cannot have; a change is in force for the next request."""
    code, _, error = deltamux("--state-dir", str(managed.server.state_dir), "list")
    assert (code, "name it with --url" in error) == (2, True)
    write_address(managed.server.state_dir, managed.server.url)
    place = ("--state-dir", str(managed.server.state_dir))
    _, admin_key, _ = deltamux(*place, "create", "ops", "--role", "admin")
    code, _, error = deltamux(*place, "list")
    assert (code, "No API key was given" in error) == (2, True)
    env = {"DELTAMUX_ADMIN_KEY": admin_key}
    _, key, _ = deltamux(*place, "create", "acme", "--limit", "queue=3", **env)
    acme = managed.client(key)
    assert acme.get("/v1/models").status_code == 200
    assert "acme  user  enabled" in deltamux(*place, "list", **env)[1]
    deltamux(*place, "disable", "acme", **env)
    assert acme.get("/v1/models").status_code == 401
    deltamux("--url", managed.server.url, "enable", "acme", **env)
    assert acme.get("/v1/models").status_code == 200
    _, rotated, _ = deltamux(*place, "rotate", "acme", "--overlap", "1h", **env)
    assert managed.client(rotated).get("/v1/models").status_code == 200
    code, _, error = deltamux("--url", "http://127.0.0.1:9", "list")
    assert (code, "cannot be asked" in error) == (2, True)


def test_a_server_of_a_tenants_file(tiny_model, tmp_path):
    """Started as a user would: keys from the file, which is read again at a hangup."""
    path = tmp_path / "tenants.yaml"
    ops = f"admin_keys: ['{hash_key('ops')}']\n"
    path.write_text(f"{ops}tenants: [{{name: a, keys: ['{hash_key('one')}']}}]")
    options = ["--served-model-name", "base", "--memory-budget", "16MiB", "--tenants", str(path)]
    model = tiny_model("llama")
    with running_server(model, *options, log=tmp_path / "log", OMP_NUM_THREADS="1") as server:

        def status(key: str) -> int:
            body = {"model": "base", "prompt": [40, 41], "max_tokens": 1}
            headers = {"Authorization": f"Bearer {key}"}
            answer = httpx.post(f"{server.openai_url}/completions", json=body, headers=headers)
            return answer.status_code

        assert [status(key) for key in ("one", "two", "ops")] == [200, 401, 200]
        path.write_text(f"{ops}tenants: [{{name: a, keys: ['{hash_key('two')}']}}]")
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: status("two") == 200)
        assert status("one") == 401
        env = {"DELTAMUX_ADMIN_KEY": "ops"}
        _, key, _ = deltamux("--state-dir", str(tmp_path / "state"), "create", "b", **env)
        assert status(key) == 200
        assert key not in (tmp_path / "log").read_text()
