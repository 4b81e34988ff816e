"""Keys and values before a request's own: written once, shared, evicted, and exactly the library's.

The cache starts full of NaN, and so does what a prefix leaves empty of its first block.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import httpx
import msgspec
import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig
from peft.config import PromptLearningConfig

from deltamux.server.composition import Composable
from deltamux.server.engine.messages import AdapterLoaded, AdapterRefused, AdapterUnloaded
from deltamux.server.generation import FinishReason
from deltamux.server.runner.prefix import load_prefix

from ..adapterhub_golden import GOLDENS
from ..peft_zoo import FAMILIES, Generation, PeftOracle, Variant
from .fake_engine import Running
from .fake_store import write_adapter
from .harness import EngineHarness, engine_config, make_request

LENGTHS = (1, 5, 16, 19)
COUNT = 5
SMALL_CHUNKS = {"max_num_seqs": 4, "max_num_batched_tokens": 5}
BLOCK_BYTES = 2048
"""Four tokens of the tiny Llama: 2 layers, 2 heads of 16, keys and values, float32."""


def tokens(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, 300), k=count)


def blocks(length: int, block_size: int) -> int:
    return -(-length // block_size)


def room(num_blocks: int, block_size: int = 4) -> dict[str, int]:
    """An engine of so many blocks, beside the least that adapters have."""
    pages = num_blocks + max(num_blocks // 9, 1)
    return {"memory_budget": pages * BLOCK_BYTES * block_size // 4, "block_size": block_size}


class Zoo:
    """Prefixes and soft prompts of every length on one base, and what PEFT gives with them."""

    def __init__(self, model: Path, folder: Path):
        self.model = model
        self.oracle = PeftOracle(model)
        self.generate = cache(self._generate)
        self.saved: dict[str, Path] = {}
        for number, length in enumerate(LENGTHS):
            self._save(f"prefix{length}", PrefixTuningConfig, length, folder, number)
        self._save("prompt5", PromptTuningConfig, 5, folder, 7)
        self._save("other5", PrefixTuningConfig, 5, folder, 8)

    def _save(
        self, name: str, config: type[PromptLearningConfig], length: int, folder: Path, seed: int
    ) -> None:
        made = Variant(
            name,
            name,
            FAMILIES,
            lambda _family, _base: config(task_type="CAUSAL_LM", num_virtual_tokens=length),
        )
        self.saved[name] = self.oracle.save(made, folder / name, seed)

    def _generate(self, name: str | None, prompt: tuple[int, ...], count: int) -> Generation:
        return self.oracle.generate(list(prompt), count, None if name is None else self.saved[name])


@pytest.fixture(scope="module")
def zoo(tiny_model, tmp_path_factory) -> Callable[[str], Zoo]:
    return cache(lambda family: Zoo(tiny_model(family), tmp_path_factory.mktemp(family)))


class Served:
    """An engine that counts the blocks of prefixes that are written, by name and index."""

    def __init__(self, zoo: Zoo, **changes):
        self.zoo = zoo
        self.engine = EngineHarness(engine_config(zoo.model, **changes))
        self.written: Counter[tuple[bytes, int]] = Counter()
        self.ids: dict[str, int] = {}
        self._asked = 0
        cache = self.engine.engine._runner._kv_cache
        for tensor in (*cache.keys, *cache.values):
            tensor.fill_(torch.nan)

    def write(self, kv_cache, load, prefixes) -> None:
        load_prefix(kv_cache, load, prefixes)
        self.written.update((load.prefix.name, index) for index in load.blocks)
        empty = -load.prefix.length % kv_cache.block_size
        if 0 in load.blocks:
            for tensor in (*kv_cache.keys, *kv_cache.values):
                tensor[load.blocks[0], :, :empty] = torch.nan

    @property
    def num_used(self) -> int:
        return self.engine.engine._blocks.num_used

    def load(self, *names: str) -> None:
        for name in names:
            self.ids[name] = len(self.ids) + 1
            answer = self.engine.load(self.ids[name], self.zoo.saved[name])
            assert isinstance(answer, AdapterLoaded), answer

    def submit(self, name: str | None, prompt: list[int], count: int = COUNT, **changes) -> str:
        self._asked += 1
        adapter_id = None if name is None else self.ids[name]
        request = make_request(
            f"r{self._asked}", prompt, adapter_id=adapter_id, max_tokens=count, **changes
        )
        self.engine.submit(request)
        return request.request_id

    def check(self, request: str, name: str | None, prompt: list[int], count: int = COUNT) -> int:
        """Cached tokens of an answer, which is PEFT's."""
        got, wanted = self.engine.received[request], self.zoo.generate(name, tuple(prompt), count)
        assert got.error is None
        assert got.token_ids == wanted.token_ids
        assert got.logprobs == pytest.approx(wanted.logprobs, abs=5e-4)
        return got.num_cached_tokens

    def ask(self, asked: Sequence[tuple[str | None, list[int]]], count: int = COUNT) -> list[int]:
        """All at once."""
        requests = [self.submit(name, prompt, count) for name, prompt in asked]
        self.engine.run()
        return [
            self.check(request, name, prompt, count)
            for request, (name, prompt) in zip(requests, asked, strict=True)
        ]


@pytest.fixture
def serve(zoo, monkeypatch):
    made = []

    def start(*names: str, family: str = "llama", **changes) -> Served:
        served = Served(zoo(family), **changes)
        made.append(served)
        monkeypatch.setattr("deltamux.server.runner.runner.load_prefix", served.write)
        served.load(*names)
        return served

    yield start
    for each in made:
        each.engine.close()


NAMES = [*(f"prefix{length}" for length in LENGTHS), "prompt5"]


@pytest.mark.parametrize(
    "changes",
    [{}, {"prefix_caching": False}, SMALL_CHUNKS, {"kernels": "reference"}],
    ids=["default", "no-caching", "small-chunks", "reference"],
)
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_every_length_is_written_once_for_all_requests(family, block_size, changes, serve):
    """Mistral's window of 16 slides over prefix and prompt; GPT-2's positions are learned."""
    served = serve(*NAMES, family=family, block_size=block_size, **changes)
    prompts = [tokens(1), tokens(9), tokens(23)]
    asked = [(name, prompt) for prompt in prompts for name in (*NAMES, None)]
    for _ in range(2):
        served.ask(asked)
    assert set(served.written.values()) == {1}
    lengths = Counter(name for name, _ in served.written)
    wanted = [blocks(length, block_size) for length in (*LENGTHS, 5)]
    assert sorted(lengths.values()) == sorted(wanted)
    assert served.num_used == 0


def test_requests_of_one_adapter_hold_one_prefix(serve):
    served = serve("prefix19", "prefix5")
    names = [served.submit("prefix19", tokens(6, seed), seed=seed) for seed in range(5)]
    names.append(served.submit("prefix5", tokens(6)))
    served.engine.step()
    assert served.num_used == 5 + 2 + 6 * 2
    served.engine.abort(names[0])
    assert served.num_used == 5 + 2 + 5 * 2
    for name in names[1:]:
        served.engine.abort(name)
    assert served.num_used == 0


@pytest.mark.parametrize("prefix_first", [True, False])
def test_the_least_recently_used_goes_first(prefix_first, serve):
    """Whether it is a prefix or a prompt."""
    served = serve("prefix19", max_model_len=64, **room(16))
    prefix, prompt = ("prefix19", tokens(1)), (None, tokens(18, seed=1))
    for each in (prefix, prompt) if prefix_first else (prompt, prefix):
        served.ask([each], count=1)
    served.ask([(None, tokens(40, seed=2))], count=2)  # needs 11 of the 16 blocks
    if prefix_first:
        assert served.ask([prompt], count=1) == [16]
        served.ask([prefix], count=1)
        assert sum(served.written.values()) == 5 + 4
    else:
        served.ask([prefix], count=1)
        assert sum(served.written.values()) == 5
        assert served.ask([prompt], count=1) == [0]


def test_what_is_left_of_a_prefix_is_not_written_again(serve):
    served = serve("prefix19", max_model_len=64, **room(16))
    served.ask([("prefix19", tokens(1))], count=1)
    served.ask([(None, tokens(50, seed=2))], count=2)  # 13 blocks: three of the prefix stay
    served.ask([("prefix19", tokens(9))])
    assert [served.written[name, index] for name, index in sorted(served.written)] == [
        1, 1, 1, 2, 2,
    ]  # fmt: skip


def test_a_held_prefix_is_never_evicted(serve):
    served = serve("prefix19", max_model_len=64, **room(16))
    prompt = tokens(3)
    kept = served.submit("prefix19", prompt, count=20)
    served.engine.step()
    for seed in range(4):
        served.submit(None, tokens(20, seed), count=3)
    served.engine.run()
    served.check(kept, "prefix19", prompt, 20)
    assert set(served.written.values()) == {1}


@pytest.mark.parametrize("changes", [{}, SMALL_CHUNKS, {"prefix_caching": False}])
def test_recomputed_after_preemption(changes, serve):
    served = serve(*NAMES, max_model_len=60, **{**room(30), **changes})
    asked = [(name, tokens(4 + seed, seed)) for seed in range(3) for name in (*NAMES, None)]
    served.ask(asked, count=16)
    assert served.engine.preemptions
    assert served.num_used == 0


def test_a_request_after_its_prefix_finds_its_own_tokens(serve):
    served = serve("prefix5", "prefix19", "other5", "prompt5")
    prompt = tokens(14)
    for again in (False, True):
        for name in ("prefix5", "prefix19", "other5", "prompt5", None):
            assert served.ask([(name, prompt)]) == [12 if again else 0]
    assert served.ask([("prefix5", [*prompt[:9], *tokens(5, seed=1)])]) == [8]


def test_prompt_logprobs_behind_a_prefix(serve, zoo):
    served = serve("prefix5", **SMALL_CHUNKS)
    prompt = tokens(17)
    for _ in range(2):
        name = served.submit("prefix5", prompt, prompt_logprobs=0)
        reports = served.engine.run()[name].prompt_logprobs
        wanted = zoo("llama").oracle.prompt_logprobs(prompt, zoo("llama").saved["prefix5"])
        assert [each.logprob for each in reports] == pytest.approx(wanted.tolist(), abs=5e-4)


def test_equal_files_share_a_prefix_and_live_apart(serve):
    """An adapter is loaded under a second name, and the first goes while requests run on both."""
    served = serve("prefix5")
    served.ids["again"] = 9
    assert isinstance(served.engine.load(9, served.zoo.saved["prefix5"]), AdapterLoaded)
    prompt = tokens(6)
    names = [served.submit(each, prompt, count=8) for each in ("prefix5", "again")]
    served.engine.step()
    assert served.num_used == 2 + 2 + 1  # their prompts' first block is one too
    served.engine.unload(served.ids["prefix5"])
    served.engine.run()
    assert served.engine.adapter_events[-1] == AdapterUnloaded(served.ids["prefix5"])
    for name in names:
        served.check(name, "prefix5", prompt, 8)
    later = served.submit("again", prompt)
    served.engine.run()
    served.check(later, "prefix5", prompt)
    assert set(served.written.values()) == {1}


def test_a_replaced_adapter_has_the_prefix_of_its_files(serve):
    """The name goes to another id while a request of the old one runs."""
    served = serve("prefix5")
    prompt = tokens(6)
    old = served.submit("prefix5", prompt, count=8)
    served.engine.step()
    served.load("other5")
    served.engine.unload(served.ids["prefix5"])
    new = served.submit("other5", prompt, count=8)
    served.engine.run()
    served.check(old, "prefix5", prompt, 8)
    served.check(new, "other5", prompt, 8)


# --- AdapterHub's

HUB = [
    golden
    for golden in GOLDENS
    if golden.family in ("llama", "gpt2") and "prefix" in golden.name.replace("noreft", "")
]


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("golden", HUB, ids=str)
def test_adapterhubs_prefixes_shift_no_position(golden, block_size, serve):
    """In some layers only, too, and beside a PEFT prefix in the same batch."""
    expected = golden.expected
    for changes in ({}, SMALL_CHUNKS):
        served = serve("prefix19", family=golden.family, block_size=block_size, **changes)
        served.ids["hub"] = 9
        assert isinstance(served.engine.load(9, golden.folder), AdapterLoaded)
        for _ in range(2):
            peft = served.submit("prefix19", tokens(9))
            names = [
                served.submit("hub", prompt, count=len(token_ids))
                for prompt, token_ids in zip(expected.prompts, expected.tokens, strict=True)
            ]
            received = served.engine.run()
            served.check(peft, "prefix19", tokens(9))
            for name, token_ids, logprobs in zip(
                names, expected.tokens, expected.logprobs, strict=True
            ):
                assert received[name].token_ids == token_ids
                assert received[name].logprobs == pytest.approx(logprobs, abs=5e-4)
        assert set(served.written.values()) == {1}


# --- lengths


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("name", "length"), [("prefix19", 19), ("prompt5", 5)])
def test_the_last_position_is_the_models_last(family, name, length, serve):
    """PEFT's shift included: one more would be past the table."""
    served = serve(name, family=family)
    longest = tokens(256 - length - 1)
    assert served.ask([(name, longest[:-2])], count=3) == [0]
    at_the_edge = served.submit(name, longest, count=9)
    too_long = served.submit(name, [*longest, 5], count=9)
    received = served.engine.run()
    assert len(received[at_the_edge].token_ids) == 1
    assert received[at_the_edge].finish_reason is FinishReason.LENGTH
    assert f"at most {256 - length} tokens" in received[too_long].error


def test_without_a_shift_all_positions_are_the_requests(serve):
    served = serve()
    [golden] = [each for each in HUB if (each.family, each.name) == ("llama", "prefix_flat")]
    served.ids["hub"] = 9
    served.engine.load(9, golden.folder)
    name = served.submit("hub", tokens(255), count=9)
    got = served.engine.run()[name]
    assert (got.error, len(got.token_ids), got.finish_reason) == (None, 1, FinishReason.LENGTH)


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({"max_model_len": 21}, True),
        ({"max_model_len": 20}, False),
        (room(6), True),
        (room(5), False),
        (room(3, 16), True),
        (room(2, 16), False),
    ],
)
def test_a_prefix_that_leaves_no_room_is_refused_when_it_is_loaded(changes, fits, serve, zoo):
    """A request needs a token and an answer beside the prefix of 19."""
    served = serve(**changes)
    if fits:
        served.load("prefix19")
        name = served.submit("prefix19", tokens(1), count=9)
        assert served.engine.run()[name].finish_reason is FinishReason.LENGTH
        assert served.engine.received[name].error is None
        return
    refused = served.engine.load(1, zoo("llama").saved["prefix19"])
    assert isinstance(refused, AdapterRefused)
    assert refused.error == "AdapterTooLarge"
    assert "19 keys and values" in refused.message
    assert "--max-model-len" in refused.message
    assert "--memory-budget" in refused.message


def test_a_prefix_takes_no_room_beside_the_blocks(serve):
    """It lies in the cache, so its size has to fit there."""
    served = serve("prefix19", memory_budget=100_000)
    served.ask([("prefix19", tokens(9))])
    assert served.engine.engine._residency.num_bytes == 0


def post(server: Running, prompt: list[int], **more) -> httpx.Response:
    body = {"model": "p", "prompt": prompt, **more}
    return httpx.post(f"{server.url}/v1/completions", json=body)


def register_prefix(server: Running, folder: Path) -> None:
    load = {"lora_name": "p", "lora_path": str(write_adapter(folder, "p"))}
    assert httpx.post(f"{server.url}/v1/load_lora_adapter", json=load).status_code == 200


def test_a_prompt_that_the_cache_cannot_hold_is_refused_before_it_is_queued(server, tmp_path):
    """The cache has four blocks of 16, of which a prefix of 5 takes one."""
    server.engine.info = msgspec.structs.replace(server.engine.info, num_blocks=4)
    server.engine.composables = {"p": Composable(None, 5, True)}
    register_prefix(server, tmp_path)
    assert post(server, tokens(47), max_tokens=1).status_code == 200
    assert post(server, tokens(48), max_tokens=1).status_code == 400
    assert post(server, tokens(40), max_tokens=9).status_code == 400
    assert len(server.engine.submitted) == 1


def test_a_prefix_without_a_shift_takes_none_of_the_models_length(server, tmp_path):
    server.engine.composables = {"p": Composable(None, 5, False)}
    register_prefix(server, tmp_path)
    assert post(server, tokens(63), max_tokens=1).status_code == 200
    assert post(server, tokens(64), max_tokens=1).status_code == 400
