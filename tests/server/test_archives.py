"""Archives of adapters: good ones are unpacked, hostile ones refused with nothing written."""

import io
import tracemalloc
from pathlib import Path

import pytest

from deltamux.server.store.archives import ArchiveLimits, unpack
from deltamux.server.store.errors import ArchiveRefused

from .fake_store import files_in
from .hostile_archives import CONFIG, GOOD, HOSTILE, WEIGHTS, packed, tar

LIMITS = ArchiveLimits(max_bytes=1_000_000, max_entries=100)
INSIDE = tuple((f"checkpoint-7/{name}", content) for name, content in GOOD)
BESIDE = (("README.md", b"x"), ("optimizer.pt", b"y" * 1000), ("checkpoint-7/more/notes", b"z"))


@pytest.mark.parametrize(
    "entries", [GOOD, INSIDE, (*INSIDE, *BESIDE)], ids=["flat", "in", "beside"]
)
@pytest.mark.parametrize("make", [tar, packed, lambda entries: tar(entries, mode="w")])
def test_the_adapters_files_and_no_others_are_unpacked(make, entries, tmp_path):
    unpack(io.BytesIO(make(entries)), tmp_path, LIMITS)
    assert files_in(tmp_path) == sorted([CONFIG[0], WEIGHTS[0]])
    for name, content in GOOD:
        assert (tmp_path / name).read_bytes() == content


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives(name, tmp_path):
    make, says = HOSTILE[name]
    raw = make()
    into = tmp_path / "in" / "side"
    into.mkdir(parents=True)
    tracemalloc.start()
    with pytest.raises(ArchiveRefused, match=says):
        unpack(io.BytesIO(raw), into, LIMITS)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 8 << 20, "what a bomb unpacks to is never in memory"
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(path.parent == into and path.name in dict(GOOD) for path in written)


def test_every_cut_of_a_good_archive_is_refused_or_whole(tmp_path: Path):
    """Wherever the bytes end, what is unpacked is an adapter's first files, each of them whole."""
    for number, raw in enumerate((tar(GOOD), packed(GOOD), tar(GOOD, mode="w"))):
        for end in range(0, len(raw), max(1, len(raw) // 60)):
            into = tmp_path / f"{number}-{end}"
            into.mkdir()
            try:
                unpack(io.BytesIO(raw[:end]), into, LIMITS)
            except ArchiveRefused:
                continue
            for path in into.iterdir():
                assert path.read_bytes() == dict(GOOD)[path.name]
