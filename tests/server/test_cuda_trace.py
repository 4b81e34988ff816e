"""The steps of a GPU, traced without one: no hidden wait for the device, no stray tensor.

Under ``FakeTensorMode`` tensors have shapes and devices and no contents, so a step that looks at
one raises, and so does one that mixes devices. What is recorded beside are copies that would make
the host wait.
"""

import ctypes
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deltamux.adapters.device.pool import AdapterPool, Placement
from deltamux.adapters.lower import lower
from deltamux.adapters.primitives.lowered import LoweredAdapter
from deltamux.kernels.gpu.backend import triton_backend
from deltamux.server.engine.build import pinned
from deltamux.server.engine.composition import use_adapters
from deltamux.server.grammar.matcher import Matcher
from deltamux.server.grammar.vocabulary import Vocabulary, VocabularySource
from deltamux.server.model import builder
from deltamux.server.model.base import ServedBase, load_base
from deltamux.server.model.blocks import RMSNorm as PlainRMSNorm
from deltamux.server.model.checkpoint import Checkpoint
from deltamux.server.runner.graphs import decode_buckets
from deltamux.server.runner.runner import Runner, StepInputs
from deltamux.server.runner.stage import PinnedStage
from deltamux.server.scheduler.plan import ScheduledSequence, StepPlan
from deltamux.server.scheduler.sequence import NO_ADAPTER, Sequence
from deltamux.server.text.reader import describe

from ..kinds import goldens, variants
from ..peft_zoo import PeftOracle
from ..plain_zoo import PLAIN_VARIANTS
from ..tiny_models import make_tokenizer
from .harness import make_request

CUDA = torch.device("cuda:0")
CUDA_TYPE, META_TYPE = 1, 14
"""c10::DeviceType."""
BLOCK, BLOCKS, MAX_SEQS, PROMPT = 4, 4096, 8, 11
DTYPE = torch.bfloat16


class Recorder(TorchDispatchMode):
    """Every operation with the shapes and places of its operands, and the copies that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[object, ...]] = []
        self.waits: list[str] = []

    @property
    def launched(self) -> set[str]:
        """The names of our operations among them."""
        names = (str(each[0]) for each in self.operations)
        return {name.split(".")[1] for name in names if name.startswith("deltamux.")}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        operands = tree_leaves((args, kwargs))
        self.operations.append((str(function), *map(_described, operands)))
        crossing = {each.device.type for each in (*operands, result) if isinstance(each, Tensor)}
        waits = "non_blocking" not in str(function._schema) or not _non_blocking(
            function, args, kwargs
        )
        if len(crossing) > 1 and waits:
            self.waits.append(f"{function} between {sorted(crossing)}")
        return result


def _described(operand: object) -> object:
    if not isinstance(operand, Tensor):
        return operand if isinstance(operand, int | float | str | bool | None) else str(operand)
    place = (tuple(operand.shape), operand.stride(), operand.storage_offset())
    return (str(operand.dtype), operand.device.type, *place)


def _non_blocking(function, args, kwargs) -> bool:
    names = [argument.name for argument in function._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return bool(given.get("non_blocking"))


@dataclass
class Traced:
    """A runner whose device has no memory, and adapters by name."""

    runner: Runner
    adapters: dict[str, LoweredAdapter]
    ids: dict[str, int]
    base: ServedBase
    mode: FakeTensorMode
    vocabulary: Vocabulary

    def sequence(self, name: str | None, decoding: bool, **sampling) -> Sequence:
        adapter = None if name is None else self.adapters[name]
        request = make_request(
            "r",
            list(range(3, 3 + PROMPT)),
            logprobs=sampling.pop("logprobs", None),
            adapter_id=None if name is None else self.ids[name],
            **sampling,
        )
        use = NO_ADAPTER
        if adapter is not None:
            use = use_adapters(request, [adapter], self.base.layout)
        sequence = Sequence(request, use, 0, self._matcher(request.sampling.grammar))
        sequence.block_table = list(range(8))
        if use.prefix is not None:
            sequence.prefix_blocks = list(range(-(-use.prefix.length // BLOCK)))
        if decoding:
            sequence.token_ids.append(7)
        return sequence

    def _matcher(self, grammar: str | None) -> Matcher | None:
        if grammar is None:
            return None
        return Matcher(self.vocabulary.compile(grammar), self.vocabulary, may_end_early=True)

    def step(self, sequences: list[Sequence], decoding: bool) -> StepPlan:
        return StepPlan(
            tuple(
                ScheduledSequence(
                    each, len(each.token_ids) - 1 if decoding else 0, len(each.token_ids), True
                )
                for each in sequences
            )
        )


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory) -> dict[str, Path]:
    """Adapters of every kind for the tiny Llama."""
    oracle, folder = PeftOracle(tiny_model("llama")), tmp_path_factory.mktemp("zoo")
    return {
        **{
            each.name: oracle.save(each, folder / each.name, seed)
            for seed, each in enumerate(variants("llama"))
        },
        **{each.name: each.folder for each in goldens("llama") if "_bf16" not in each.name},
        **{
            each.name: each.save(oracle.model, folder / "plain" / each.name, seed)
            for seed, each in enumerate(PLAIN_VARIANTS)
        },
    }


@pytest.fixture(scope="module")
def lowered(tiny_model, saved) -> dict[str, LoweredAdapter]:
    base = load_base(tiny_model("llama"), DTYPE)
    return {name: lower(path, base, 1 << 30) for name, path in saved.items()}


@contextmanager
def device_guard() -> Iterator[None]:
    """torch built for the CPU alone has no guard of CUDA devices; here it has one.

    The guard of the device without memory does nothing, which is what is wanted.
    ``torch._C._ensureCUDADeviceGuardSet`` does the same in builds with CUDA where there is no GPU.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 16).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before = guards[CUDA_TYPE]
    if before is None:
        guards[CUDA_TYPE] = guards[META_TYPE]
    yield
    guards[CUDA_TYPE] = before


@contextmanager
def files_read_really() -> Iterator[None]:
    """Models are loaded without their contents: files are read, and numbers are not looked at."""
    read = Checkpoint.read

    def read_really(checkpoint: Checkpoint, *arguments: object) -> Tensor:
        with unset_fake_temporarily():
            return read(checkpoint, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "read", read_really)
        patch.setattr(builder, "_is_finite", lambda tensor: True)
        yield


@pytest.fixture(scope="module")
def traced(tiny_model, lowered) -> Iterator[Traced]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for adapter in lowered.values():
        len(adapter.index_digests)  # of contents, which nothing has in this mode
    with device_guard():
        with mode, files_read_really():
            made = make_traced(tiny_model("llama"), lowered, mode)
        yield made


def make_traced(model: Path, lowered: dict[str, LoweredAdapter], mode: FakeTensorMode) -> Traced:
    backend = triton_backend({})
    base = load_base(model, DTYPE, CUDA, backend)
    memory = torch.empty(1 << 28, dtype=torch.uint8, device=CUDA)
    pool = AdapterPool(base.layout, 4 * len(lowered), memory, DTYPE)
    placements: dict[int, Placement] = {}
    ids = {}
    for number, (name, adapter) in enumerate(lowered.items(), start=1):
        ids[name] = number
        placement = pool.install(adapter)
        assert placement is not None
        placements[number] = placement
    num_bytes = 1 << 20
    twin = torch.empty(num_bytes, dtype=torch.uint8, device=CUDA)
    stage = PinnedStage(np.zeros(num_bytes, dtype=np.uint8), twin)
    runner = Runner(
        base.decoder,
        base.decoder.new_kv_cache(BLOCKS, BLOCK),
        pool,
        backend.deltas,
        backend.largest,
        placements.__getitem__,
        {ids[name]: adapter for name, adapter in lowered.items()}.__getitem__,
        stage,
        decode_buckets(MAX_SEQS),
    )
    size = base.decoder.config.vocab_size
    vocabulary = VocabularySource.of(describe(make_tokenizer()), size).load()
    return Traced(runner, lowered, ids, base, mode, vocabulary)


@torch.inference_mode()
def record(traced: Traced, plan: StepPlan) -> tuple[Recorder, StepInputs]:
    with traced.mode, Recorder() as recorder:
        inputs = traced.runner.prepare(plan)
        traced.runner.choose(inputs, traced.runner.compute(inputs))
    return recorder, inputs


def test_every_adapter_is_pinned_in_one_piece(lowered, monkeypatch):
    """Page-locking itself needs a GPU; where the tensors lie does not."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda memory: memory)
    for name, adapter in lowered.items():
        moved = pinned(adapter)
        before = (*adapter.tensors, *(adapter.prefix.tensors if adapter.prefix else ()))
        after = (*moved.tensors, *(moved.prefix.tensors if moved.prefix else ()))
        assert len({tensor.untyped_storage().data_ptr() for tensor in after}) <= 1, name
        for one, other in zip(before, after, strict=True):
            assert torch.equal(one, other), name
            assert one.dtype is other.dtype


SAMPLING = (
    {},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 5, "min_p": 0.1},
    {"logit_bias": {5: 1.0}, "min_tokens": 3, "end_token_ids": [2]},
    {"repetition_penalty": 1.2, "presence_penalty": 0.1, "frequency_penalty": 0.2},
    {"grammar": "start: /[a-z]+/", "temperature": 0.8, "logprobs": 2},
)


EVERY_OPERATION = {
    *("correct_affine", "add_dense", "add_sparse", "add_kronecker", "add_circulant"),
    *("replace_outputs", "transform_input", "replace_rows", "correct_embedding", "override_norm"),
    *("add_bottleneck", "add_side_attention"),
}
"""Of adapters; spectral corrections are transforms of torch around ``add_sparse``."""


@pytest.mark.parametrize("decoding", [True, False], ids=["decode", "prefill"])
def test_no_step_waits_for_the_device(traced, decoding):
    """Adapters of every kind, several to a step, every way to sample, and blocks for beams."""
    names, launched = list(traced.adapters), set()
    for first in range(0, len(names), MAX_SEQS - 1):
        sequences = [
            traced.sequence(name, decoding, **SAMPLING[index % len(SAMPLING)])
            for index, name in enumerate([None, *names[first : first + MAX_SEQS - 1]])
        ]
        plan = replace(traced.step(sequences, decoding), block_copies=((1, 20), (2, 21)))
        recorder, inputs = record(traced, plan)
        assert recorder.waits == []
        assert (inputs.batch.bucket is not None) == (decoding and _is_captured(inputs))
        launched |= recorder.launched
    assert launched >= EVERY_OPERATION


def _is_captured(inputs: StepInputs) -> bool:
    """Not where a row has several parts of adapters, or a prefix is of some layers only."""
    if len(inputs.batch.passes) > 1:
        return False
    prefixes = [each.sequence.adapters.prefix for each in inputs.batch.scheduled]
    return all(each is None or each.layers is None for each in prefixes)


def test_a_step_of_base_rows_launches_nothing_of_adapters(traced):
    recorder, inputs = record(traced, traced.step([traced.sequence(None, True)] * 3, True))
    assert inputs.deltas is None
    assert inputs.batch.bucket == 4
    assert not recorder.launched & EVERY_OPERATION


def test_steps_of_one_shape_are_the_same_launches_on_the_same_memory(traced):
    """So that what was captured for one can be replayed for another, whoever its adapters are."""
    by_shape: dict[Hashable, list[tuple[object, ...]]] = {}
    shared = 0
    for name in traced.adapters:
        sequences = [traced.sequence(each, True) for each in (None, name, None)]
        recorder, inputs = record(traced, traced.step(sequences, True))
        if inputs.batch.bucket is not None:
            shared += inputs.shape in by_shape
            assert by_shape.setdefault(inputs.shape, recorder.operations) == recorder.operations, (
                name
            )
    assert shared > 20


def test_shapes_tell_apart_what_is_launched_differently(traced):
    def shape(*names: str | None) -> Hashable:
        sequences = [traced.sequence(name, True) for name in names]
        return record(traced, traced.step(sequences, True))[1].shape

    assert shape("lora", None) == shape(None, "lora")
    different = [("lora", "lora"), ("oft", None), (None, None), ("lora", None, None)]
    assert len({shape("lora", None), *(shape(*names) for names in different)}) == 5


def test_a_hidden_look_at_the_device_is_found(traced, monkeypatch):
    """The proof fails when it should."""
    forward = PlainRMSNorm.add

    def looking(norm: PlainRMSNorm, x: Tensor, residual: Tensor, deltas: object) -> Tensor:
        y = forward(norm, x, residual, deltas)
        return y * y.sum().item()

    monkeypatch.setattr(PlainRMSNorm, "add", looking)
    with pytest.raises(DataDependentOutputException):
        record(traced, traced.step([traced.sequence(None, True)], True))


def test_a_copy_that_makes_the_host_wait_is_found(traced, monkeypatch):
    place = PinnedStage.place

    def waiting(stage: PinnedStage, array: np.ndarray) -> Tensor:
        placed = place(stage, array)
        return torch.zeros(array.shape, dtype=placed.dtype).to(placed.device)

    monkeypatch.setattr(PinnedStage, "place", waiting)
    recorder, _ = record(traced, traced.step([traced.sequence(None, True)], True))
    assert recorder.waits


def test_a_tensor_left_on_the_host_is_found(traced, monkeypatch):
    monkeypatch.setattr(PinnedStage, "place", lambda stage, array: torch.from_numpy(array))
    with pytest.raises((RuntimeError, ValueError), match="device"):
        record(traced, traced.step([traced.sequence("lora", True)], True))
