"""Archives that must be refused, each with what the refusal says; and good ones."""

import gzip
import io
import json
import stat
import tarfile
import zipfile
from collections.abc import Callable

CONFIG = ("adapter_config.json", json.dumps({"label": "archived"}).encode())
WEIGHTS = ("adapter_model.safetensors", b"weights" * 100)
GOOD = (CONFIG, WEIGHTS)

Entries = tuple[tuple[str, bytes], ...]


def tar(entries: Entries, *special: tarfile.TarInfo, mode: str = "w:gz") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in special:
            archive.addfile(info, io.BytesIO(b"\0" * info.size) if info.isreg() else None)
    return file.getvalue()


def packed(entries: Entries, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return file.getvalue()


def member(name: str, kind: bytes, target: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


def linked_zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(*CONFIG)
        info = zipfile.ZipInfo(WEIGHTS[0])
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    return file.getvalue()


def lying_zip() -> bytes:
    """The directory says that the weights are short; their data are not."""
    raw = bytearray(packed((CONFIG, (WEIGHTS[0], b"\0" * 100_000))))
    at = raw.rindex(b"PK\x01\x02")
    raw[at + 24 : at + 28] = (10).to_bytes(4, "little")
    return bytes(raw)


def crowded_zip() -> bytes:
    """A directory of many entries; the announced number of them is small."""
    raw = bytearray(packed(tuple((f"{number}.txt", b"") for number in range(3000))))
    at = raw.rindex(b"PK\x05\x06")
    raw[at + 8 : at + 12] = (2).to_bytes(2, "little") * 2
    return bytes(raw)


def headers_bomb() -> bytes:
    """A header whose extension announces a gigabyte, all of it there once it is unpacked."""
    info = member("x", tarfile.XHDTYPE, size=1 << 30)
    file = io.BytesIO()
    with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1) as packed_file:
        packed_file.write(info.tobuf(tarfile.USTAR_FORMAT))
        for _ in range(64):
            packed_file.write(b"\0" * (1 << 20))
    return file.getvalue()


def size_bomb() -> bytes:
    return tar((CONFIG,), member(WEIGHTS[0], tarfile.REGTYPE, size=64 << 20))


def cut(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


ZIP64 = packed(GOOD)[:-22] + b"PK\x06\x07" + b"\0" * 16 + packed(GOOD)[-22:]

HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "tar-parent": (lambda: tar((*GOOD, ("../evil", b"x"))), "leaves the folder"),
    "tar-parent-inside": (lambda: tar((*GOOD, ("a/../../evil", b"x"))), "leaves the folder"),
    "tar-absolute": (lambda: tar((*GOOD, ("/evil", b"x"))), "leaves the folder"),
    "tar-backslashes": (lambda: tar((*GOOD, ("..\\evil", b"x"))), "leaves the folder"),
    "tar-drive": (lambda: tar((*GOOD, ("C:/evil", b"x"))), "leaves the folder"),
    "tar-symlink": (
        lambda: tar((CONFIG,), member(WEIGHTS[0], tarfile.SYMTYPE, "/etc/passwd")),
        "is a link or a device",
    ),
    "tar-symlinked-folder": (
        lambda: tar(GOOD, member("a", tarfile.SYMTYPE, "/etc")),
        "is a link or a device",
    ),
    "tar-hard-link": (
        lambda: tar((CONFIG,), member(WEIGHTS[0], tarfile.LNKTYPE, "../../secret")),
        "is a link or a device",
    ),
    "tar-device": (lambda: tar(GOOD, member("a", tarfile.CHRTYPE)), "is a link or a device"),
    "tar-fifo": (lambda: tar(GOOD, member("a", tarfile.FIFOTYPE)), "is a link or a device"),
    "tar-doubled": (lambda: tar((*GOOD, CONFIG)), "two entries"),
    "tar-doubled-spelling": (lambda: tar((*GOOD, ("./" + CONFIG[0], b"x"))), "two entries"),
    "tar-many": (lambda: tar(tuple((f"{n}", b"") for n in range(200))), "more than 100 entries"),
    "tar-bomb": (size_bomb, "more than 1000000 bytes"),
    "tar-header-bomb": (headers_bomb, "header of more than 1 MiB"),
    "tar-cut": (lambda: tar(GOOD, mode="w")[:1800], "cannot be read"),
    "gz-cut": (lambda: cut(tar(GOOD)), "cannot be read"),
    "zip-parent": (lambda: packed((*GOOD, ("../evil", b"x"))), "leaves the folder"),
    "zip-absolute": (lambda: packed((*GOOD, ("/evil", b"x"))), "leaves the folder"),
    "zip-symlink": (linked_zip, "is a link or a device"),
    "zip-many": (lambda: packed(tuple((f"{n}", b"") for n in range(200))), "than 100 entries"),
    "zip-crowded": (crowded_zip, "more than 100 entries"),
    "zip-bomb": (lambda: packed((CONFIG, (WEIGHTS[0], b"\0" * (8 << 20)))), "than 1000000 bytes"),
    "zip-lying": (lying_zip, "larger than it says|cannot be read"),
    "zip-lzma": (lambda: packed(GOOD, zipfile.ZIP_LZMA), "not stored or deflated"),
    "zip-cut": (lambda: cut(packed(GOOD)), "not complete"),
    "zip64": (lambda: ZIP64, "zip64"),
    "empty": (lambda: b"", "cannot be read|holds no"),
    "text": (lambda: b"no archive at all" * 100, "cannot be read"),
    "no-adapter": (lambda: tar((("README.md", b"x"),)), "holds no adapter_config.json"),
    "two-adapters": (
        lambda: tar((*GOOD, *((f"b/{name}", content) for name, content in GOOD))),
        "2 adapters",
    ),
}
