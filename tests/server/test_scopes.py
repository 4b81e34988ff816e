"""Adapters that leave some positions alone share the base's cached blocks there, and no others.

Every expected value is the library's own, computed for each request alone and without a cache.
"""

import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from peft import LNTuningConfig, LoraConfig, PeftConfig

from deltamux.server.engine.messages import AdapterLoaded

from ..adapterhub_golden import GOLDENS
from ..kinds import SHUFFLED
from ..peft_zoo import FAMILIES, PeftOracle, Variant
from .harness import EngineHarness, Received, engine_config, make_request

BLOCK = 4
INVOCATION = (31, 7, 7, 12)
FIRST, SECOND = 1, 2
"""Ids of two activated LoRAs with one invocation."""
SMALL_CHUNKS = {"max_num_seqs": 3, "max_num_batched_tokens": 3}


def tokens(count: int, seed: int = 0) -> list[int]:
    """None of them in the invocation."""
    return random.Random(seed).choices(range(40, 300), k=count)


def variant(name: str, make: Callable[[], PeftConfig], **fields) -> Variant:
    return Variant(name, name, FAMILIES, lambda _family, _base: make(), **fields)


def alora() -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=["q_proj", "k_proj", "v_proj", "down_proj"],
        alora_invocation_tokens=list(INVOCATION),
    )


class Zoo:
    """A base of one family with adapters that PEFT made."""

    def __init__(self, model: Path, folder: Path):
        self.model = model
        self.oracle = PeftOracle(model)
        self._folder = folder
        self.saved: dict[int, Path] = {}

    def save(self, adapter_id: int, made: Variant) -> None:
        folder = self._folder / str(adapter_id)
        self.saved[adapter_id] = self.oracle.save(made, folder, seed=adapter_id)


@pytest.fixture(scope="module")
def activated(tiny_model, tmp_path_factory) -> Zoo:
    zoo = Zoo(tiny_model("llama"), tmp_path_factory.mktemp("activated"))
    for adapter_id in (FIRST, SECOND):
        zoo.save(adapter_id, variant("alora", alora, prompt_tokens=INVOCATION))
    return zoo


class Served:
    """An engine with all adapters of a zoo; its answers are compared with PEFT's."""

    def __init__(self, zoo: Zoo, **changes):
        self.zoo = zoo
        self.engine = EngineHarness(engine_config(zoo.model, **{"block_size": BLOCK, **changes}))
        for adapter_id, folder in zoo.saved.items():
            assert isinstance(self.engine.load(adapter_id, folder), AdapterLoaded)
        self._asked = 0

    def ask(self, adapter_id: int | None, prompt: list[int], *output: int, count: int = 5) -> int:
        """Check the answer of one request; its cached tokens."""
        return self.ask_together([(adapter_id, prompt)], *output, count=count)[0]

    def ask_together(
        self, asked: list[tuple[int | None, list[int]]], *output: int, count: int = 5
    ) -> list[int]:
        names = [f"r{self._asked + index}" for index in range(len(asked))]
        self._asked += len(asked)
        for name, (adapter_id, prompt) in zip(names, asked, strict=True):
            request = make_request(
                name, prompt, adapter_id=adapter_id, max_tokens=len(output) + count
            )
            request = msgspec.structs.replace(request, output_token_ids=list(output))
            self.engine.submit(request)
        received = self.engine.run()
        for name, (adapter_id, prompt) in zip(names, asked, strict=True):
            self.check(received[name], adapter_id, [*prompt, *output], len(prompt), count)
        return [received[name].num_cached_tokens for name in names]

    def check(
        self, got: Received, adapter_id: int | None, before: list[int], prompt: int, count: int
    ) -> None:
        assert got.error is None
        wanted = self.zoo.oracle.generate(
            before, count, None if adapter_id is None else self.zoo.saved[adapter_id]
        )
        assert got.token_ids == wanted.token_ids
        assert got.logprobs == pytest.approx(wanted.logprobs, abs=2e-4)


@pytest.fixture
def serve():
    made = []

    def start(zoo: Zoo, **changes) -> Served:
        made.append(Served(zoo, **changes))
        return made[-1]

    yield start
    for each in made:
        each.engine.close()


@pytest.mark.parametrize("chunks", [{}, SMALL_CHUNKS], ids=["whole", "small-chunks"])
@pytest.mark.parametrize("before", [0, 3, 4, 10, 16])
@pytest.mark.parametrize(
    ("earlier", "later"), [(None, FIRST), (FIRST, None), (FIRST, SECOND), (FIRST, FIRST)]
)
def test_blocks_before_the_invocation_belong_to_everybody(
    earlier, later, before, chunks, activated, serve
):
    prompt = [*tokens(before), *INVOCATION, *tokens(9, seed=1)]
    served = serve(activated, **chunks)
    assert served.ask(earlier, prompt) == 0
    limit = len(prompt) - 1 if earlier == later else before
    assert served.ask(later, prompt) == limit // BLOCK * BLOCK


def test_without_its_invocation_it_is_the_base(activated, serve):
    prompt = tokens(14)
    served = serve(activated)
    assert served.ask(FIRST, prompt) == 0
    for other in (None, SECOND, FIRST):
        assert served.ask(other, prompt) == 12


def test_the_last_invocation_counts(activated, serve):
    prompt = [*tokens(5), *INVOCATION, *tokens(5, seed=1), *INVOCATION, *tokens(3, seed=2)]
    served = serve(activated)
    served.ask(None, prompt)
    assert served.ask(FIRST, prompt) == 12
    assert served.ask(FIRST, [*prompt[:9], *tokens(9, seed=3)]) == 4


@pytest.mark.parametrize("block_size", [4, 16])
def test_an_invocation_in_the_output_is_none(block_size, activated, serve):
    """The same tokens with a later invocation in the prompt are another sequence."""
    prompt = [*tokens(3), *INVOCATION]
    output = [*tokens(2, seed=1), *INVOCATION, *tokens(8, seed=2)]
    served = serve(activated, block_size=block_size)
    engine = served.engine
    request = make_request("first", prompt, adapter_id=FIRST, max_tokens=len(output) + 1)
    engine.submit(msgspec.structs.replace(request, output_token_ids=output))
    engine.run()
    whole = [*prompt, *output]
    assert served.ask(FIRST, whole) == 0
    assert served.ask(FIRST, whole) == (len(whole) - 1) // block_size * block_size


def test_a_resumed_request_is_corrected_from_its_invocation_on(activated, serve):
    prompt = [*tokens(6), *INVOCATION, *tokens(2, seed=1)]
    wanted = activated.oracle.generate(prompt, 12, activated.saved[FIRST])
    for chunks in ({}, SMALL_CHUNKS):
        engine = serve(activated, **chunks).engine
        request = make_request("resumed", prompt, adapter_id=FIRST, max_tokens=12)
        engine.submit(msgspec.structs.replace(request, output_token_ids=wanted.token_ids[:7]))
        got = engine.run()["resumed"]
        assert got.token_ids == wanted.token_ids[7:]
        assert got.logprobs == pytest.approx(wanted.logprobs[7:], abs=2e-4)


def test_equal_prompts_that_start_together_share_what_they_have_in_common(activated, serve):
    prompt = [*tokens(13), *INVOCATION, *tokens(6, seed=1)]
    served = serve(activated)
    asked = [(each, prompt) for each in (None, FIRST, SECOND, FIRST)]
    assert served.ask_together(asked) == [0, 12, 12, 20]


REFT = [
    golden
    for golden in GOLDENS
    if golden.family == "llama" and golden.config["config"].get("architecture") == "reft"
]


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("golden", REFT, ids=str)
def test_a_scope_that_ends_with_the_prompt_shares_no_block_of_another_prompt(
    golden, block_size, tiny_model
):
    """Each prompt is asked for after its own beginnings and continuations, of every length."""
    engine = EngineHarness(engine_config(tiny_model("llama"), block_size=block_size))
    assert isinstance(engine.load(1, golden.folder), AdapterLoaded)
    expected = golden.expected
    for number, prompt in enumerate(expected.prompts):
        longer = [*prompt, *expected.tokens[number], *tokens(7)]
        for length in range(1, len(longer) + 1):
            if length != len(prompt):
                name = f"{number}-{length}"
                engine.submit(make_request(name, longer[:length], adapter_id=1, max_tokens=2))
    engine.run()
    for number, prompt in enumerate(expected.prompts):
        if (golden.name, len(prompt)) in SHUFFLED:
            continue
        count = len(expected.tokens[number])
        engine.submit(make_request(str(number), prompt, adapter_id=1, max_tokens=count))
        got = engine.run()[str(number)]
        assert got.token_ids == expected.tokens[number]
        assert got.logprobs == pytest.approx(expected.logprobs[number], abs=2e-4)
    engine.close()


BEHIND = {
    "head": {
        "usual": lambda: LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["lm_head"]),
        "gpt2": lambda: LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["lm_head"]),
    },
    "final-norm": {
        "usual": lambda: LNTuningConfig(task_type="CAUSAL_LM", target_modules=["norm"]),
        "gpt2": lambda: LNTuningConfig(task_type="CAUSAL_LM", target_modules=["ln_f"]),
    },
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
def test_what_acts_behind_the_layers_shares_all_blocks(family, tiny_model, tmp_path, serve):
    """An embedding that the head is tied to is not changed with it."""
    zoo = Zoo(tiny_model(family), tmp_path)
    for adapter_id, configs in enumerate(BEHIND.values(), start=1):
        make = configs["gpt2" if family == "gpt2" else "usual"]
        zoo.save(adapter_id, variant("behind", make))
    served = serve(zoo)
    prompt = tokens(23)
    assert served.ask(1, prompt) == 0
    for adapter_id in (None, 2, 1):
        assert served.ask(adapter_id, prompt) == 20
    together = [(adapter_id, tokens(9, seed=1)) for adapter_id in (None, 1, 2)]
    assert sorted(served.ask_together(together)) == [0, 8, 8]


def test_the_norm_of_a_layer_is_not_behind_it(tiny_model, tmp_path, serve):
    zoo = Zoo(tiny_model("qwen3"), tmp_path)
    target = ["layers.1.self_attn.k_norm"]
    zoo.save(1, variant("ln", lambda: LNTuningConfig(task_type="CAUSAL_LM", target_modules=target)))
    served = serve(zoo)
    prompt = tokens(23)
    served.ask(None, prompt)
    assert served.ask(1, prompt) == 0
