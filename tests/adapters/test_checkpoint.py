"""Folders made by a stranger: every way to be broken or malicious ends in an AdapterError."""

import json
import os
import pickle
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from deltamux.adapters.checkpoint import OVERHEAD_BYTES, open_checkpoint
from deltamux.adapters.errors import (
    AdapterCorrupt,
    AdapterError,
    AdapterNotFound,
    AdapterTooLarge,
    AdapterUnsupported,
)
from deltamux.adapters.folder import (
    MAX_CONFIG_BYTES,
    ConfigFile,
    digest_of,
    hash_folder,
    open_config,
)

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "adapter"
    made.mkdir()
    (made / CONFIG).write_text('{"r": 4}')
    save_file({"a": torch.arange(6.0).view(2, 3), "i": torch.arange(3)}, made / SAFETENSORS)
    return made


def read(folder: Path):
    return open_checkpoint(open_config(folder))


def refused(folder: Path, kind: type[AdapterError], says: str) -> None:
    with pytest.raises(kind) as caught:
        read(folder)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_a_good_folder(folder):
    checkpoint = read(folder)
    assert checkpoint.config == {"r": 4}
    assert torch.equal(checkpoint.tensors["a"], torch.arange(6.0).view(2, 3))
    assert checkpoint.tensors.keys() == {"a", "i"}
    files = [(name, (folder / name).read_bytes()) for name in (CONFIG, SAFETENSORS)]
    assert checkpoint.digest == digest_of(files) == hash_folder(folder)


@pytest.mark.parametrize("name", ["pirate", "robot", "notes"])
def test_a_folder_hashes_to_the_digest_of_what_is_parsed(name):
    folder = Path(__file__).parents[2] / "examples" / "adapters" / name
    assert hash_folder(folder) == read(folder).digest


@pytest.mark.parametrize("missing", [CONFIG, SAFETENSORS])
def test_no_digest_of_half_a_folder(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(AdapterCorrupt):
        hash_folder(folder)


def test_the_digest_tells_where_one_file_ends():
    assert digest_of([("f", b"ab"), ("g", b"c")]) != digest_of([("f", b"a"), ("g", b"bc")])
    assert digest_of([("f", b"a")]) != digest_of([("g", b"a")])


def test_the_digest_is_of_the_bytes_that_were_parsed(folder):
    """The file is exchanged after it was read: tensors and digest are still of one version."""
    checkpoint = read(folder)
    old = (folder / SAFETENSORS).read_bytes()
    save_file({"a": torch.zeros(2, 3)}, folder / SAFETENSORS)
    assert checkpoint.digest == digest_of([(CONFIG, b'{"r": 4}'), (SAFETENSORS, old)])
    assert torch.equal(checkpoint.tensors["a"], torch.arange(6.0).view(2, 3))


def test_no_folder(tmp_path):
    refused(tmp_path / "nowhere", AdapterNotFound, "nowhere")


def test_a_file_instead_of_a_folder(folder):
    refused(folder / CONFIG, AdapterNotFound, CONFIG)


def test_no_config(folder):
    (folder / CONFIG).unlink()
    refused(folder, AdapterCorrupt, CONFIG)


def test_the_folder_above_the_adapter(folder):
    refused(folder.parent, AdapterCorrupt, f"did you mean its folder {folder.name}?")


def test_no_weights(folder):
    (folder / SAFETENSORS).unlink()
    refused(folder, AdapterCorrupt, SAFETENSORS)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"\xff\xfe\x00", "JSON"),
        (b"[1, 2]", "list"),
        (b"null", "NoneType"),
        (b'{"r": NaN}', "NaN"),
        (b'{"r": Infinity}', "Infinity"),
        (b'{"r": 4, "r": 8}', "'r' appears twice"),
        (b'{"a": {"b": 1, "b": 1}}', "'b' appears twice"),
        (b'{"r": ' + b"9" * 5000 + b"}", "JSON"),
        (b"[" * 100_000, "JSON"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_configs(content, says, folder):
    (folder / CONFIG).write_bytes(content)
    refused(folder, AdapterCorrupt, says)


def test_a_config_that_is_too_large(folder):
    (folder / CONFIG).write_bytes(b" " * MAX_CONFIG_BYTES + b"{}")
    refused(folder, AdapterTooLarge, CONFIG)


def test_a_repeated_key_among_very_many(folder):
    """In linear time: a megabyte holds keys enough to keep anything slower busy for a minute."""
    keys = ",".join(f'"{i}":0' for i in range(60_000))
    (folder / CONFIG).write_text(f'{{{keys},"59999":0}}')
    started = time.process_time()
    refused(folder, AdapterCorrupt, "'59999' appears twice")
    assert time.process_time() - started < 2


def refused_unread(folder: Path, max_numbers: int, says: str) -> None:
    config = open_config(folder)
    tracemalloc.start()
    try:
        with pytest.raises(AdapterTooLarge, match=says):
            open_checkpoint(config, max_numbers)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", [SAFETENSORS, PICKLE])
def test_weights_that_are_too_large_are_not_read(name, folder):
    size, limit = 300 << 20, (1 << 18) * 8 + OVERHEAD_BYTES
    (folder / SAFETENSORS).unlink()
    (folder / name).touch()
    os.truncate(folder / name, size)
    refused_unread(folder, 1 << 18, f"{name} has {size} bytes, more than the limit of {limit}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_numbers_that_a_header_declares_are_counted(dtype, folder):
    numbers = 3 << 20
    save_file({"a": torch.ones(numbers - 5, dtype=dtype), "b": torch.ones(5)}, folder / SAFETENSORS)
    refused_unread(folder, numbers - 1, f"holds {numbers} numbers, more than the {numbers - 1}")
    assert open_checkpoint(open_config(folder), numbers).tensors["a"].dtype is dtype


def test_a_sparse_file_of_a_terabyte(folder):
    os.truncate(folder / SAFETENSORS, 1 << 40)
    refused(folder, AdapterTooLarge, SAFETENSORS)


def header(fields: dict[str, object], data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        b"\xff" * 64,
        save({"a": torch.ones(100)})[:-1],
        save({"a": torch.ones(100)})[:50],
        save({"a": torch.ones(4)}) + b"tail",
        header({}, length=1 << 62),
        header({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"\0" * 12),
        header({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, b"\0" * 8),
        header({"a": entry([2], 8, 16)}, b"\0" * 16),
        header({"a": entry([2], 0, 1 << 60)}, b"\0" * 8),
        header({"a": entry([1 << 62, 1 << 62], 0, 8)}, b"\0" * 8),
        header({"a": entry([-2], 0, 8)}, b"\0" * 8),
        header({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8),
        header({"a": 3}),
    ],
    ids=lambda content: repr(content[:24]),
)
def test_broken_safetensors(content, folder):
    (folder / SAFETENSORS).write_bytes(content)
    refused(folder, AdapterCorrupt, SAFETENSORS)


def test_every_truncation_is_refused(folder):
    whole = (folder / SAFETENSORS).read_bytes()
    for length in range(len(whole)):
        (folder / SAFETENSORS).write_bytes(whole[:length])
        refused(folder, AdapterCorrupt, SAFETENSORS)


def test_a_dtype_that_torch_does_not_read(folder):
    (folder / SAFETENSORS).write_bytes(header({"a": entry([2], 0, 2, "F8_E8M0")}, b"\0" * 2))
    refused(folder, AdapterUnsupported, "F8_E8M0")


def test_not_finite_is_named(folder):
    save_file(
        {"fine": torch.ones(2), "sick": torch.tensor([1.0, float("nan")])}, folder / SAFETENSORS
    )
    refused(folder, AdapterCorrupt, "'sick'")


def test_links_as_in_a_hub_cache(folder, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for name in (CONFIG, SAFETENSORS):
        (folder / name).rename(blobs / name)
        (folder / name).symlink_to(Path("..") / "blobs" / name)
    assert read(folder).config == {"r": 4}


@pytest.mark.parametrize("name", [CONFIG, SAFETENSORS])
def test_links_to_what_is_no_file(name, folder, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for target, says in (
        (tmp_path, "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (fifo, "not a regular file"),
        (tmp_path / "gone", "does not exist"),
        (folder / name, "cannot be opened"),
    ):
        (folder / name).unlink()
        (folder / name).symlink_to(target)
        refused(folder, AdapterCorrupt, says)


def test_a_folder_in_place_of_a_file(folder):
    (folder / SAFETENSORS).unlink()
    (folder / SAFETENSORS).mkdir()
    refused(folder, AdapterCorrupt, "not a regular file")


def test_an_unreadable_config_shows_nothing_of_itself(folder):
    (folder / CONFIG).write_text("root:secret-hash:0:0")
    with pytest.raises(AdapterCorrupt) as caught:
        read(folder)
    assert "secret-hash" not in str(caught.value)


class WritesAFile:
    """A pickle that runs code when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def pickled(folder: Path) -> Path:
    (folder / SAFETENSORS).unlink()
    return folder


def test_a_pickle_of_tensors(pickled):
    torch.save({"a": torch.ones(2, 3)}, pickled / PICKLE)
    assert torch.equal(read(pickled).tensors["a"], torch.ones(2, 3))


def test_a_pickle_that_runs_code(pickled, tmp_path):
    canary = tmp_path / "canary"
    torch.save({"a": torch.ones(2), "b": WritesAFile(canary)}, pickled / PICKLE)
    refused(pickled, AdapterUnsupported, SAFETENSORS)
    assert not canary.exists()
    torch.load(pickled / PICKLE, weights_only=False)["b"].close()
    assert canary.exists(), "the file would have run its code elsewhere"


def test_a_bare_pickle_that_runs_code(pickled, tmp_path):
    canary = tmp_path / "canary"
    (pickled / PICKLE).write_bytes(pickle.dumps(WritesAFile(canary)))
    refused(pickled, AdapterCorrupt, SAFETENSORS)
    assert not canary.exists()


@pytest.mark.parametrize("keep", [0, 10, 100, -1])
def test_a_truncated_pickle(keep, pickled):
    torch.save({"a": torch.ones(200)}, pickled / PICKLE)
    whole = (pickled / PICKLE).read_bytes()
    (pickled / PICKLE).write_bytes(whole[:keep])
    refused(pickled, AdapterCorrupt, PICKLE)


def test_a_pickle_with_damaged_bytes(pickled):
    torch.save({"a": torch.ones(2)}, pickled / PICKLE)
    whole = (pickled / PICKLE).read_bytes()
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        (pickled / PICKLE).write_bytes(damaged)
        try:
            tensors = read(pickled).tensors
        except AdapterError:
            continue
        assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())


def test_a_pickle_that_inflates(pickled):
    with zipfile.ZipFile(pickled / PICKLE, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (1 << 22))
    refused(pickled, AdapterUnsupported, "compressed")


@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(2)],
        {"a": [torch.ones(2)]},
        {"a": 3},
        {3: torch.ones(2)},
        {"a": torch.ones(2).to_sparse()},
        {"a": torch.ones(1).expand(1 << 40)},
        {"a": torch.ones(2, device="meta")},
    ],
    ids=str,
)
def test_pickles_of_something_else(content, pickled):
    torch.save(content, pickled / PICKLE)
    refused(pickled, AdapterUnsupported, PICKLE)


def test_safetensors_wins_over_pickle(folder):
    torch.save({"b": torch.zeros(1)}, folder / PICKLE)
    assert "a" in read(folder).tensors


def test_config_file_is_what_was_read(folder):
    config = open_config(folder)
    assert config == ConfigFile(
        folder=folder,
        library="peft",
        fields={"r": 4},
        options={},
        interface=None,
        read=((CONFIG, b'{"r": 4}'),),
    )


def test_options_beside_an_adapter_are_part_of_its_version(folder):
    plain = read(folder).digest
    (folder / "deltamux.json").write_text('{"task_id": 1}')
    assert open_config(folder).options == {"task_id": 1}
    first = read(folder).digest
    (folder / "deltamux.json").write_text('{"task_id": 2}')
    assert len({plain, first, read(folder).digest}) == 3
    (folder / "deltamux.json").write_text("[1]")
    refused(folder, AdapterCorrupt, "deltamux.json")


def test_two_adapters_in_one_folder(folder):
    (folder / "delta_config.json").write_text('{"delta_type": "tensors"}')
    refused(folder, AdapterCorrupt, "two adapters")


def test_an_adapter_fusion_is_named(folder):
    (folder / CONFIG).rename(folder / "adapter_fusion_config.json")
    refused(folder, AdapterUnsupported, "AdapterFusion")
