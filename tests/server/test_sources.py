"""Where adapters come from: paths, the hub, web servers and object stores; and what is allowed."""

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import fsspec
import huggingface_hub
import pytest

from deltamux.adapters.errors import AdapterCorrupt, AdapterNotFound, AdapterTooLarge
from deltamux.adapters.folder import hash_folder
from deltamux.server.store.archives import ArchiveLimits
from deltamux.server.store.contents import ContentStore
from deltamux.server.store.errors import FetchFailed, SourceForbidden, SourceRefused
from deltamux.server.store.intake import Intake
from deltamux.server.store.sources import SourceKind, SourcePolicy, parse_source

from .fake_store import files_in, write_adapter
from .hostile_archives import GOOD, packed, tar

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def intake(tmp_path) -> Intake:
    limits = ArchiveLimits(max_bytes=100_000, max_entries=100)
    return Intake(ContentStore(tmp_path / "store"), limits)


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_adapter(tmp_path / "adapter", "one")


def staged_digest(intake: Intake, source: str) -> str:
    staged = intake.stage(parse_source(source))
    assert staged.digest == hash_folder(staged.folder)
    intake.contents.discard(staged.folder)
    return staged.digest


def refused(intake: Intake, source: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        intake.stage(parse_source(source))
    root = intake.contents.path("any").parents[1]
    assert files_in(root) == ["contents", "staging"], "nothing is left behind"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


@contextmanager
def web_server(handler) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("some/path", SourceKind.LOCAL),
        ("/some/path", SourceKind.LOCAL),
        ("file:///some/path", SourceKind.LOCAL),
        ("hf://org/name", SourceKind.HUB),
        ("hf://org/name/sub/folder@v1", SourceKind.HUB),
        ("s3://bucket/a", SourceKind.URL),
        ("https://host/a.tar.gz", SourceKind.URL),
    ],
)
def test_kinds_of_sources(text, kind):
    source = parse_source(text)
    assert source.kind is kind
    assert parse_source(source.text) == source
    if kind is SourceKind.LOCAL:
        assert source.path.is_absolute()


NO_SOURCES = ["", " ", "a\0b", "x" * 5000, "hf://name", "https://user:secret@host/a"]
NO_SOURCES += ["s3://b/a?key=secret", "https://host/a#b", "s3://b/../c", "s3://b/%2e%2e/c"]
NO_SOURCES += [
    "simplecache::s3://b/a",
    "s3://b/..\\c",
    "http://[",
    "http://[::",
    "https://x:secret@[",
]


@pytest.mark.parametrize("text", NO_SOURCES)
def test_what_is_no_source(text):
    with pytest.raises(SourceRefused) as caught:
        parse_source(text)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("patterns", "text", "allowed"),
    [
        (("local",), "/any/path", True),
        (("local",), "file:///any/path", True),
        (("local",), "hf://org/name", False),
        (("upload",), "/any/path", False),
        ((), "/any/path", False),
        (("/srv/adapters",), "/srv/adapters/a", True),
        (("/srv/adapters",), "/srv/adapters/../secret", False),
        (("/srv/adapters",), "/srv/adapters-too/a", False),
        (("hf://org",), "hf://org/name@v1", True),
        (("hf://org",), "hf://organisation/name", False),
        (("hf://org/name@v1",), "hf://org/name@v2", False),
        (("hf://org/name",), "hf://org/name@v2", True),
        (("https://host",), "https://host.evil/a", False),
        (("https://host/",), "https://host/a", True),
        (("s3://bucket/a",), "s3://bucket/a/b", True),
        (("s3://bucket/a",), "s3://bucket/ab", False),
    ],
)
def test_what_a_policy_allows(patterns, text, allowed):
    policy, source = SourcePolicy(patterns), parse_source(text)
    if allowed:
        policy.require(source)
    else:
        with pytest.raises(SourceForbidden, match="--adapter-source"):
            policy.require(source)


def test_uploads_can_be_forbidden():
    SourcePolicy().require_upload()
    with pytest.raises(SourceForbidden):
        SourcePolicy(("local",)).require_upload()


def test_a_local_folder_is_copied_with_the_files_of_the_adapter_alone(intake, folder):
    (folder / "README.md").touch()
    staged = intake.stage(parse_source(str(folder)))
    assert staged.digest == hash_folder(folder) == hash_folder(staged.folder)
    assert files_in(staged.folder) == ["adapter_config.json", "adapter_model.safetensors"]
    assert staged.file_bytes == sum(
        (staged.folder / name).stat().st_size for name in files_in(staged.folder)
    )


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.zip", "a.tar"])
@pytest.mark.parametrize("scheme", ["", "file://", "memory:/"])
def test_archives_from_paths_and_file_systems(name, scheme, intake, tmp_path):
    raw = packed(GOOD) if name.endswith("zip") else tar(GOOD)
    where = f"{scheme}{tmp_path / name}"
    with fsspec.open(where, "wb") as file:
        file.write(raw)
    assert staged_digest(intake, where) == staged_digest(intake, where)


def test_a_folder_in_fsspecs_memory(intake, folder):
    for path in folder.iterdir():
        with fsspec.open(f"memory://bucket/one/{path.name}", "wb") as file:
            file.write(path.read_bytes())
    assert staged_digest(intake, "memory://bucket/one") == hash_folder(folder)
    refused(intake, "memory://bucket/two", FetchFailed, "has no adapter_config.json")


def test_a_folder_and_an_archive_on_a_web_server(intake, folder, tmp_path):
    (tmp_path / "a.zip").write_bytes(packed([(p.name, p.read_bytes()) for p in folder.iterdir()]))
    (tmp_path / "broken.tar.gz").write_bytes(tar(GOOD)[:100])
    with web_server(partial(Quiet, directory=tmp_path)) as url:
        assert staged_digest(intake, f"{url}/adapter") == hash_folder(folder)
        assert staged_digest(intake, f"{url}/adapter/") == hash_folder(folder)
        assert staged_digest(intake, f"{url}/a.zip") == hash_folder(folder)
        refused(intake, f"{url}/nothing", FetchFailed, "has no adapter_config.json")
        refused(intake, f"{url}/nothing.zip", FetchFailed, "cannot be fetched")
        (folder / "adapter_model.safetensors").unlink()
        refused(intake, f"{url}/adapter", AdapterCorrupt, "holds neither")
    refused(intake, f"{url}/adapter", FetchFailed, "cannot be fetched")


def test_a_file_that_is_not_given_is_not_taken_for_one_that_is_not_there(intake, folder, tmp_path):
    """An adapter without its options would be another adapter."""

    class Overloaded(Quiet):
        def send_head(self):
            if self.path.endswith("deltamux.json"):
                self.send_error(503)
                return None
            return super().send_head()

    with web_server(partial(Overloaded, directory=tmp_path)) as url:
        refused(intake, f"{url}/adapter", FetchFailed, "503")


def test_sources_that_are_too_large(intake, folder, tmp_path):
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 200_000)
    refused(intake, str(folder), AdapterTooLarge, "more than 100000")
    with web_server(partial(Quiet, directory=tmp_path)) as url:
        refused(intake, f"{url}/adapter", FetchFailed, "more than the")


@pytest.mark.parametrize("url", ["s3://bucket/a", "gs://bucket/a", "nonsense://a/b"])
def test_file_systems_that_are_not_installed_are_named(url, intake, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    scheme = url.partition(":")[0]
    packages = {"s3": "s3fs", "gs": "gcsfs", "nonsense": "nonsense"}
    refused(intake, url, FetchFailed, packages[scheme])


def test_a_full_disk_is_told(intake, folder, monkeypatch):
    def full(source, target) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("deltamux.server.store.intake._copy_file", full)
    refused(intake, str(folder), FetchFailed, "No space left")


def test_what_is_not_there(intake, tmp_path):
    refused(intake, str(tmp_path / "nothing"), AdapterNotFound, "no adapter folder")
    refused(intake, str(tmp_path / "nothing.zip"), AdapterNotFound, "no adapter folder")


def test_files_that_change_while_they_are_read_are_refused(intake, folder, monkeypatch):
    read = iter(["one state", "another"])
    monkeypatch.setattr("deltamux.server.store.intake.fingerprint", lambda path: next(read))
    refused(intake, str(folder), AdapterCorrupt, "changed while they were read")


class Hub(Quiet):
    """As much of the hub as serves the files of one repository."""

    files: dict[str, bytes]
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        self.asked.append(self.path)
        if match := re.fullmatch(
            r"/api/models/org/name/(revision|tree)/([^/?]+)(\?.*)?", self.path
        ):
            self._json(self._info(match[1]) if match[2] in ("main", "v1", SHA) else None)
        elif match := re.fullmatch(rf"/org/name/resolve/{SHA}/(.+)", self.path):
            self._file(match[1], body)
        else:
            self._json(None)

    def _info(self, what: str) -> object:
        files = [
            {"type": "file", "path": name, "size": len(raw), "oid": hashlib.sha1(raw).hexdigest()}
            for name, raw in self.files.items()
        ]
        siblings = [{"rfilename": name} for name in self.files]
        return files if what == "tree" else {"id": "org/name", "sha": SHA, "siblings": siblings}

    def _json(self, content: object) -> None:
        raw = json.dumps(content or {}).encode()
        self.send_response(404 if content is None else 200)
        if content is None:
            self.send_header("X-Error-Code", "RevisionNotFound")
        self._send(raw, "application/json")

    def _file(self, name: str, body: bool) -> None:
        raw = self.files.get(name)
        self.send_response(404 if raw is None else 200)
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("ETag", f'"{hashlib.sha1(raw or b"").hexdigest()}"')
        self._send(raw or b"", "application/octet-stream", body)

    def _send(self, raw: bytes, kind: str, body: bool = True) -> None:
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(raw)


@pytest.fixture
def hub(folder, tmp_path, monkeypatch) -> Iterator[type[Hub]]:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    inside = {f"sub/{name}": raw.replace(b"one", b"two") for name, raw in files.items()}
    handler = type(
        "OneHub", (Hub,), {"files": files | inside | {"big.bin": b"x" * 10**6}, "asked": []}
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with web_server(handler) as url:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield handler


def test_the_hub_gives_an_adapter_at_the_commit_that_is_kept(hub, intake, folder):
    staged = intake.stage(parse_source("hf://org/name"))
    assert staged.digest == hash_folder(folder)
    assert staged.source == f"hf://org/name@{SHA}"
    inside = intake.stage(parse_source("hf://org/name/sub@v1"))
    assert (inside.digest != staged.digest, inside.source) == (True, f"hf://org/name/sub@{SHA}")
    for each in (staged, inside):
        intake.contents.discard(each.folder)
    assert not any("big.bin" in path for path in hub.asked)
    refused(intake, "hf://org/name@nowhere", FetchFailed, "cannot be fetched")
    refused(intake, "hf://org/other", FetchFailed, "cannot be fetched")


def test_the_hub_is_not_asked_offline(hub, intake, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(intake, f"hf://org/name@{SHA}", FetchFailed, "cannot be fetched")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    online = staged_digest(intake, "hf://org/name")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert staged_digest(intake, "hf://org/name") == online
    assert staged_digest(intake, f"hf://org/name@{SHA}") == online
    assert hub.asked == []


def test_a_hub_adapter_that_is_too_large_is_not_downloaded(hub, intake):
    hub.files = hub.files | {"adapter_model.safetensors": b"x" * 200_000}
    refused(intake, "hf://org/name", FetchFailed, "more than 100000")
    assert not any("resolve" in path and "GET" in path for path in hub.asked)
