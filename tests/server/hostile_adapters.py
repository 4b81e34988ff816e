"""Adapter folders that must be refused, each made from a good one by one change."""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class HostileAdapter:
    """A folder, the status of its refusal, and a word of the reason that must be given."""

    name: str
    path: Path
    status: int
    says: str


class _Payload:
    """Unpickles to a call that makes a file: what no server may ever do."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def hostile_adapters(good: Path, out: Path, proof: Path) -> list[HostileAdapter]:
    """Every hostile folder under ``out``; unpickling one of them would make ``proof``."""
    changes: dict[str, tuple[Callable[[Path], object], str]] = {
        **dict(_configs()),
        **dict(_weight_files((good / WEIGHTS).read_bytes())),
        **dict(_tensors()),
        **dict(_pickles(proof)),
    }
    made = []
    for name, (change, says) in changes.items():
        shutil.copytree(good, out / name)
        change(out / name)
        made.append(HostileAdapter(name, out / name, 400, says))
    (out / "a-file").write_text("x")
    return [
        *made,
        HostileAdapter("missing", out / "missing", 404, "no adapter folder"),
        HostileAdapter("a-file", out / "a-file", 404, "no adapter folder"),
    ]


def _configs() -> Iterator[tuple[str, tuple[Callable[[Path], object], str]]]:
    for name, raw in {
        "config-empty": b"",
        "config-not-json": b"r: 4",
        "config-list": b"[]",
        "config-binary": b"\x80\x04\xff" * 10,
        "config-nested": b"[" * 100_000,
        "config-huge": b'{"peft_type": "' + b"x" * (2 << 20) + b'"}',
        "config-nan": b'{"peft_type": "LORA", "r": 4, "lora_alpha": NaN}',
        "config-twice": b'{"peft_type": "LORA", "r": 4, "r": 8}',
    }.items():
        yield name, (lambda folder, raw=raw: (folder / CONFIG).write_bytes(raw), CONFIG)
    yield "config-gone", (lambda folder: (folder / CONFIG).unlink(), CONFIG)
    yield "config-fifo", (_config_fifo, CONFIG)
    for name, fields, says in [
        ("rank-billion", {"r": 10**9}, "1000000000, more than"),
        ("rank-huge", {"r": 10**30}, "'r'"),
        ("rank-zero", {"r": 0}, "'r'"),
        ("rank-negative", {"r": -1}, "'r'"),
        ("rank-text", {"r": "4"}, "'r'"),
        ("rank-other", {"r": 8}, "ask for [8"),
        ("alpha-huge", {"lora_alpha": 10**400}, "lora_alpha"),
        ("pattern-endless", {"rank_pattern": {"(.*a)+" * 20: 4}}, "rank_pattern"),
        ("type-unknown", {"peft_type": "NOVEL"}, "NOVEL"),
        ("type-ia3", {"peft_type": "IA3"}, "alpha_pattern"),
        ("type-null", {"peft_type": None}, "peft_type"),
        ("field-unknown", {"sparkle_factor": 3}, "sparkle_factor"),
        ("dora", {"use_dora": True}, "magnitude"),
        ("whole-modules", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("replication", {"layer_replication": [[0, 2]]}, "layer_replication"),
        ("pissa", {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
    ]:
        yield name, (lambda folder, fields=fields: _edit_config(folder, fields), says)


def _weight_files(raw: bytes) -> Iterator[tuple[str, tuple[Callable[[Path], object], str]]]:
    header = {"a": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}
    overlap = {name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for name in ("a", "b")}
    for name, content in {
        **{f"truncated-{n}": raw[:n] for n in (0, 1, 7, 8, 20, len(raw) // 2, len(raw) - 1)},
        "trailing": raw + b"\0",
        "header-bomb": (2**63 - 1).to_bytes(8, "little") + raw[8:],
        "header-nested": (10**5).to_bytes(8, "little") + b"[" * 10**5,
        "terabytes": _safetensors(header),
        "overlapping": _safetensors(overlap),
        "html": b"<html>not found</html>",
    }.items():
        yield name, (lambda folder, c=content: (folder / WEIGHTS).write_bytes(c), WEIGHTS)
    yield "weights-gone", (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS)
    yield "weights-dangling", (_dangling, WEIGHTS)


def _tensors() -> Iterator[tuple[str, tuple[Callable[[Path], object], str]]]:
    a, b = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"
    for name, tensors, says in [
        ("nan", {b: torch.full((64, 4), torch.nan)}, "NaN"),
        ("inf", {a: torch.full((4, 64), torch.inf)}, "Inf"),
        ("width", {a: torch.ones(4, 128)}, "another base"),
        ("output", {b: torch.ones(128, 4)}, "another base"),
        ("deep", {k.replace("s.0.", "s.31."): v for k, v in _pair().items()}, "layers.31"),
        ("other-names", {k.replace("q_proj", "Wqkv"): v for k, v in _pair().items()}, "Wqkv"),
        ("rank-differs", {b: torch.ones(64, 5)}, "lora_B"),
        ("transposed", {a: torch.ones(64, 4)}, "lora_A"),
        ("integers", {a: torch.ones(4, 64, dtype=torch.int64)}, "int64"),
        ("no-dimension", {a: torch.tensor(1.0)}, "lora_A"),
        ("escaping", {"../../etc/passwd": torch.ones(1)}, "passwd"),
    ]:
        yield name, (lambda folder, tensors=tensors: _edit_tensors(folder, tensors), says)


def _pickles(proof: Path) -> Iterator[tuple[str, tuple[Callable[[Path], object], str]]]:
    name = "adapter_model.bin"
    yield "pickle-bare", (lambda folder: _bare_pickle(folder / name, proof), name)
    yield "pickle-archive", (lambda folder: _archived_pickle(folder / name, proof), name)


def _bare_pickle(path: Path, proof: Path) -> None:
    (path.parent / WEIGHTS).unlink()
    path.write_bytes(pickle.dumps({"weight": _Payload(proof)}))


def _archived_pickle(path: Path, proof: Path) -> None:
    (path.parent / WEIGHTS).unlink()
    torch.save({"weight": torch.ones(2), "more": _Payload(proof)}, path)


def _pair() -> dict[str, torch.Tensor]:
    return {f"{Q0}.lora_A.weight": torch.ones(4, 64), f"{Q0}.lora_B.weight": torch.ones(64, 4)}


def _edit_config(folder: Path, fields: dict[str, object]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def _edit_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({**load_file(folder / WEIGHTS), **tensors}, folder / WEIGHTS)


def _safetensors(header: dict[str, object]) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(16)


def _config_fifo(folder: Path) -> None:
    (folder / CONFIG).unlink()
    os.mkfifo(folder / CONFIG)


def _dangling(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("nowhere")
