"""Several adapters in one request: their weighted sum, what is refused, and who waits for whom.

The expected values are those of one adapter or one model that is the sum, in PEFT or transformers.
"""

import copy
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import httpx
import pytest
import torch
from peft import LoKrConfig, LoraConfig, PeftConfig, PrefixTuningConfig
from safetensors.torch import load_file, save_file

from deltamux.adapters.device.pool import AdapterPool
from deltamux.adapters.device.residency import Residency
from deltamux.adapters.layout import LinearTarget
from deltamux.adapters.primitives.linear import Affine
from deltamux.adapters.primitives.lowered import LoweredAdapter, Part
from deltamux.adapters.scope import EveryPosition
from deltamux.kernels.backend import DeltaOps
from deltamux.server.composition import CompositionRefused, Room, check_composition
from deltamux.server.engine.composition import composable
from deltamux.server.engine.messages import AdapterLoaded, AdapterUnloaded, LoadAdapter
from deltamux.server.generation import AdapterWeight, FinishReason
from deltamux.server.model.decoder import Decoder

from ..adapterhub_golden import GOLDENS
from ..peft_zoo import FAMILIES, VARIANTS, Generation, PeftOracle, Variant
from ..plain_zoo import PlainVariant
from .harness import EngineHarness, engine_config, make_request
from .running import running_server

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORAS = {"a": (3, ["q_proj", "v_proj"]), "b": (5, LINEAR), "c": (2, ["down_proj", "v_proj"])}
INVOCATION = (31, 7, 7, 12)
SMALL_CHUNKS = {"max_num_seqs": 3, "max_num_batched_tokens": 3}
COUNT = 6


def tokens(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(40, 300), k=count)


PROMPT = tokens(21)
PAGE = 512
"""Bytes of a token of the tiny Llama: 2 layers, 2 heads of 16, keys and values, float32."""


def variant(config: PeftConfig, **made) -> Variant:
    return Variant("made", "made", FAMILIES, lambda _family, _base: copy.deepcopy(config), **made)


def lora(rank: int, modules: list[str], **more) -> LoraConfig:
    values = {"lora_alpha": 2 * rank, "task_type": "CAUSAL_LM", **more}
    return LoraConfig(r=rank, target_modules=modules, **values)


def bitfit(model, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A bias for every linear module, which has none in the base."""
    return {
        f"{path}.bias": torch.randn(module.out_features, generator=generator) * 0.3
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and path != "lm_head"
    }


[BOTTLENECK] = [each for each in GOLDENS if (each.family, each.name) == ("llama", "seq_bn")]
BITFIT = PlainVariant("bitfit", "bitfit", bitfit, {"mode": "replace"})


@dataclass(frozen=True)
class Zoo:
    """Adapters of many kinds on one base.

    Attributes:
        model: The base's folder.
        oracle: The base in transformers.
        saved: Folders by name.
        biases: Those of the ``bitfit`` delta.
    """

    model: Path
    oracle: PeftOracle
    saved: dict[str, Path]
    biases: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def zoo(tiny_model, tmp_path_factory) -> Zoo:
    model, folder = tiny_model("llama"), tmp_path_factory.mktemp("zoo")
    oracle = PeftOracle(model)
    alora = lora(4, LINEAR, alora_invocation_tokens=list(INVOCATION))
    made = {
        **{name: variant(lora(*shape)) for name, shape in LORAS.items()},
        "lokr": variant(LoKrConfig(task_type="CAUSAL_LM", r=2, alpha=5, target_modules=LINEAR)),
        "alora": variant(alora, prompt_tokens=INVOCATION),
        **{
            f"prefix{length}": variant(
                PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length)
            )
            for length in (5, 11)
        },
    }
    saved = {
        name: oracle.save(each, folder / name, seed)
        for seed, (name, each) in enumerate(made.items())
    }
    saved["bitfit"] = BITFIT.save(oracle.model, folder / "bitfit", seed=3)
    saved["bottleneck"] = BOTTLENECK.folder
    return Zoo(model, oracle, saved, bitfit(oracle.model, torch.Generator().manual_seed(3)))


Chosen = Sequence[tuple[str, float]]


class Served:
    """An engine with all adapters of a zoo."""

    def __init__(self, zoo: Zoo, names: Sequence[str] | None = None, **changes):
        self.zoo = zoo
        self.engine = EngineHarness(engine_config(zoo.model, **changes))
        self.ids = {name: number for number, name in enumerate(names or zoo.saved, start=1)}
        for name, adapter_id in self.ids.items():
            answer = self.engine.load(adapter_id, zoo.saved[name])
            assert isinstance(answer, AdapterLoaded), answer
        self._asked = itertools.count()

    def submit(self, prompt: list[int], *chosen: tuple[str, float], count: int = COUNT) -> str:
        name = f"r{next(self._asked)}"
        weights = [AdapterWeight(self.ids[each], weight) for each, weight in chosen]
        self.engine.submit(make_request(name, prompt, adapters=weights, max_tokens=count))
        return name

    def check(self, name: str, wanted: Generation) -> int:
        """Cached tokens of an answer, which is the wanted one."""
        got = self.engine.received[name]
        assert got.error is None
        assert got.token_ids == wanted.token_ids
        assert got.logprobs == pytest.approx(wanted.logprobs, abs=5e-4)
        return got.num_cached_tokens

    def ask(self, wanted: Generation, prompt: list[int], *chosen: tuple[str, float]) -> int:
        name = self.submit(prompt, *chosen)
        self.engine.run()
        return self.check(name, wanted)


@pytest.fixture
def serve(zoo):
    made = []

    def start(*names: str, **changes) -> Served:
        made.append(Served(zoo, names or None, **changes))
        return made[-1]

    yield start
    for each in made:
        each.engine.close()


def concatenated(zoo: Zoo, chosen: Chosen, folder: Path) -> Path:
    """One LoRA, saved by PEFT, with the factors of all, those of B scaled."""
    rank = sum(LORAS[name][0] for name, _ in chosen)
    modules = sorted({module for name, _ in chosen for module in LORAS[name][1]})
    model = zoo.oracle.load(zoo.oracle.save(variant(lora(rank, modules)), folder, 0))
    parts = [
        (weight, load_file(zoo.saved[name] / "adapter_model.safetensors"))
        for name, weight in chosen
    ]
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".lora_" in key:
                parameter.zero_()
                stored = key.replace(".default", "")
                start = 0
                for (weight, tensors), (name, _) in zip(parts, chosen, strict=True):
                    size = LORAS[name][0]
                    if stored in tensors and "lora_A" in key:
                        parameter[start : start + size] = tensors[stored]
                    elif stored in tensors:
                        parameter[:, start : start + size] = weight * tensors[stored]
                    start += size
    model.save_pretrained(folder)
    return folder


def changed(zoo: Zoo, chosen: Chosen) -> PeftOracle:
    """The base plus weight * (what the library merges - base), and all else of each adapter."""
    oracle = copy.copy(zoo.oracle)
    oracle.model = copy.deepcopy(zoo.oracle.model)
    base = zoo.oracle.model.state_dict()
    for name, weight in chosen:
        if name == "bitfit":
            for key, bias in zoo.biases.items():
                module = oracle.model.get_submodule(key.removesuffix(".bias"))
                module.bias = torch.nn.Parameter(weight * bias)
        elif name != "bottleneck":
            merged = zoo.oracle.load(zoo.saved[name]).merge_and_unload().state_dict()
            with torch.no_grad():
                for key, parameter in oracle.model.named_parameters():
                    if key in base:
                        parameter += weight * (merged[key] - base[key])
    with_bottleneck(oracle.model, sum(weight for name, weight in chosen if name == "bottleneck"))
    return oracle


def with_bottleneck(model, weight: float) -> None:
    """x + weight * (U relu(D x + d) + u) behind every layer, x what it put out."""
    tensors = torch.load(BOTTLENECK.folder / "pytorch_adapter.bin")
    for index, layer in enumerate(model.model.layers):
        down, d, up, u = (
            tensors[f"model.layers.{index}.output_adapters.adapters.foo.{part}"]
            for part in (
                "adapter_down.0.weight",
                "adapter_down.0.bias",
                "adapter_up.weight",
                "adapter_up.bias",
            )
        )
        layer.register_forward_hook(
            lambda _module, _args, x, down=down, d=d, up=up, u=u: (
                x + weight * (torch.relu(x @ down.T + d) @ up.T + u)
            )
        )


@pytest.mark.parametrize(
    "chosen",
    [
        [("a", 0.5), ("b", 1.5)],
        [("b", -1.0), ("a", 0.25)],
        [("a", 0.7), ("b", 0.3), ("c", -0.5)],
        [("a", 1.0), ("b", 0.0), ("c", 1.0)],
        [("b", 0.4)],
        [("a", 0.0)],
    ],
    ids=lambda chosen: ",".join(f"{name}*{weight}" for name, weight in chosen),
)
def test_loras_sum_to_the_lora_with_all_their_factors(chosen, zoo, serve, tmp_path):
    wanted = zoo.oracle.generate(PROMPT, COUNT, concatenated(zoo, chosen, tmp_path / "sum"))
    for changes in ({}, SMALL_CHUNKS, {"kernels": "reference"}):
        served = serve("a", "b", "c", **changes)
        for order in itertools.permutations(chosen):
            served.ask(wanted, PROMPT, *order)


SUMS = [
    [("a", 0.5), ("bottleneck", 1.0)],
    [("bottleneck", -0.5), ("b", 1.0)],
    [("a", 1.0), ("lokr", 0.5)],
    [("bitfit", 0.5), ("b", 0.5)],
    [("a", -0.5), ("lokr", 1.0), ("bottleneck", 0.5), ("bitfit", 1.0)],
    [("bottleneck", 1.0)],
    [("bitfit", 2.0)],
]


@pytest.mark.parametrize("chosen", SUMS, ids=lambda chosen: "+".join(name for name, _ in chosen))
def test_whatever_adds_can_be_summed(chosen, zoo, serve):
    oracle = changed(zoo, chosen)
    served = serve()
    for prompt in (PROMPT, tokens(2), tokens(40, seed=1)):
        served.ask(oracle.generate(prompt, COUNT), prompt, *chosen)


def test_the_oracle_of_the_bottleneck_is_adapterhubs(zoo):
    oracle, expected = changed(zoo, [("bottleneck", 1.0)]), BOTTLENECK.expected
    for prompt, token_ids, logprobs in zip(
        expected.prompts, expected.tokens, expected.logprobs, strict=True
    ):
        found = oracle.generate(prompt, len(token_ids))
        assert found.token_ids == token_ids
        assert found.logprobs == pytest.approx(logprobs, abs=2e-4)


def joined_prefix(zoo: Zoo, names: Sequence[str], folder: Path) -> Path:
    """One prefix adapter of PEFT whose embeddings are those of all, in order."""
    folder.mkdir()
    config = json.loads((zoo.saved[names[0]] / "adapter_config.json").read_text())
    rows = [load_file(zoo.saved[name] / "adapter_model.safetensors") for name in names]
    embeddings = torch.cat([each["prompt_embeddings"] for each in rows])
    config["num_virtual_tokens"] = len(embeddings)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"prompt_embeddings": embeddings}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_prefixes_stand_one_behind_the_other(block_size, zoo, serve, tmp_path):
    served = serve("prefix5", "prefix11", block_size=block_size)
    for number, names in enumerate((["prefix5", "prefix11"], ["prefix11", "prefix5"])):
        whole = joined_prefix(zoo, names, tmp_path / str(number))
        for prompt in (PROMPT, tokens(1), tokens(40, seed=1)):
            wanted = zoo.oracle.generate(prompt, COUNT, whole)
            served.ask(wanted, prompt, *((name, 1.0) for name in names))


def test_a_prefix_beside_corrections(zoo, serve):
    """The prefix is as it was trained; the request's own tokens are corrected."""
    oracle = changed(zoo, [("a", 0.5), ("bitfit", 1.0)])
    wanted = oracle.generate(PROMPT, COUNT, zoo.saved["prefix5"])
    for order in itertools.permutations([("a", 0.5), ("prefix5", 1.0), ("bitfit", 1.0)]):
        serve("a", "prefix5", "bitfit").ask(wanted, PROMPT, *order)


@pytest.mark.parametrize("changes", [{}, SMALL_CHUNKS], ids=["whole", "small-chunks"])
def test_an_activated_lora_beside_a_lora(changes, zoo, serve):
    """It acts from its invocation on, and up to there the other's blocks are its own."""
    prompt = [*tokens(10), *INVOCATION, *tokens(5, seed=1)]
    oracle, served = changed(zoo, [("a", 0.5)]), serve("a", "alora", **changes)
    alone, both = (
        oracle.generate(prompt, COUNT, adapter) for adapter in (None, zoo.saved["alora"])
    )
    assert served.ask(alone, prompt, ("a", 0.5)) == 0
    assert served.ask(both, prompt, ("a", 0.5), ("alora", 1.0)) == 8
    assert served.ask(both, prompt, ("a", 0.5), ("alora", 1.0)) == 16


def test_everything_in_one_batch(zoo, serve):
    """Sums beside what they are sums of, in small chunks, and thrown out of a small cache."""
    asked: list[Chosen] = [*SUMS, [], *([(name, 1.0)] for name in zoo.saved if name != "alora")]
    prompts = [tokens((2, 9, 20)[index % 3], index) for index in range(len(asked))]
    wanted = []
    for chosen, prompt in zip(asked, prompts, strict=True):
        prefixes = [zoo.saved[name] for name, _ in chosen if name.startswith("prefix")]
        sums = [each for each in chosen if not each[0].startswith("prefix")]
        wanted.append(changed(zoo, sums).generate(prompt, 16, *prefixes))
    for changes in ({}, {"max_num_batched_tokens": 33}, {"prefix_caching": False}):
        served = serve(memory_budget=160_000, **changes)
        names = [
            served.submit(prompt, *each, count=16)
            for each, prompt in zip(asked, prompts, strict=True)
        ]
        served.engine.run()
        assert served.engine.preemptions
        for name, each in zip(names, wanted, strict=True):
            served.check(name, each)


def test_blocks_are_shared_by_equal_weights_alone(zoo, serve):
    served = serve("a", "b")
    weights = {(1.0,): 0, (1.0, 1.0): 0, (1.0, 0.0): 0, (1.0, 0.5): 0, (1.0, -0.5): 0, (0.5,): 0}
    for again in (False, True):
        for chosen in weights:
            sums = list(zip("ab", chosen, strict=False))
            cached = served.ask(changed(zoo, sums).generate(PROMPT, COUNT), PROMPT, *sums)
            assert cached == (20 if again else 0)


def test_one_adapter_with_the_weight_one_is_that_adapter(zoo, serve):
    served = serve("a")
    wanted = zoo.oracle.generate(PROMPT, COUNT, zoo.saved["a"])
    assert served.ask(wanted, PROMPT, ("a", 1.0)) == 0
    served.engine.submit(
        make_request("alone", PROMPT, adapter_id=served.ids["a"], max_tokens=COUNT)
    )
    served.engine.run()
    assert served.check("alone", wanted) == 20


NO_SUM = ["dora", "ia3", "oft", "ln-tuning", "lora-save-norm", "trainable-tokens", "prompt-tuning"]


@pytest.mark.parametrize("name", NO_SUM)
def test_what_has_no_weighted_sum_is_refused_by_name(name, zoo, serve, tmp_path):
    [made] = [each for each in VARIANTS if each.name == name]
    served = serve("a")
    loaded = served.engine.load(9, zoo.oracle.save(made, tmp_path / name, 0))
    assert isinstance(loaded, AdapterLoaded)
    plain = composable(served.engine.host.lowered(served.ids["a"]))
    for chosen in ([("x", 0.5)], [("x", 1.0), ("a", 1.0)], [("a", 1.0), ("x", 1.0)]):
        known = {"x": loaded.info.composable, "a": plain}
        with pytest.raises(CompositionRefused, match="x cannot be weighted or combined") as refused:
            check_composition([(each, weight, known[each]) for each, weight in chosen])
        assert ("soft prompt" if name == "prompt-tuning" else "scales or replaces") in str(
            refused.value
        )
        served.ids["x"] = 9
        got = served.submit(PROMPT, *chosen)
        served.engine.run()
        assert served.engine.received[got].finish_reason is FinishReason.ERROR
        assert "cannot be weighted or combined" in served.engine.received[got].error


# --- who waits for whom


def takes(served: Served, name: str) -> Room:
    return composable(served.engine.host.lowered(served.ids[name])).takes


@pytest.fixture(scope="module")
def alike(zoo) -> Zoo:
    """With four adapters of one size."""
    folder = zoo.saved["a"].parent
    saved = {
        name: zoo.oracle.save(variant(lora(4, ["q_proj"])), folder / name, seed)
        for seed, name in enumerate("wxyz", start=50)
    }
    return replace(zoo, saved=saved)


@pytest.fixture
def served(alike):
    """An engine that has loaded the four, with host memory for two of them."""
    one = Served(alike, "w")
    made = Served(alike, host_memory_budget=2 * takes(one, "w").host_bytes)
    yield made
    for each in (one, made):
        each.engine.close()


def settle(served: Served, *names: str) -> None:
    """Run until these requests have ended; a wait that never ends fails."""
    engine = served.engine
    engine.run()
    while any(engine.received[name].finish_reason is None for name in names):
        engine.wait_for_load()
        engine.run()


def expected(served: Served, *chosen: tuple[str, float]) -> Generation:
    return changed(served.zoo, chosen).generate(PROMPT, COUNT)


def test_one_adapter_is_there_and_the_other_is_not(served):
    assert sorted(served.engine.host.ready()) == [served.ids["y"], served.ids["z"]]
    chosen = (("z", 1.0), ("w", 0.5))
    name = served.submit(PROMPT, *chosen)
    assert not served.engine.engine.has_work
    settle(served, name)
    served.check(name, expected(served, *chosen))


def test_requests_that_hold_one_adapter_each_do_not_wait_for_each_other(served):
    """Host memory has room for the two adapters of any one of them, and of one at a time."""
    running = served.submit(PROMPT, ("y", 1.0), count=12)  # keeps y in host memory
    served.engine.step()
    asked = [("z", "w"), ("y", "x"), ("w", "x"), ("x", "z")]
    pairs = [[(first, 1.0), (second, 0.5)] for first, second in asked]
    names = [served.submit(PROMPT, *pair) for pair in pairs]
    single = served.submit(PROMPT, ("w", 1.0))
    settle(served, running, single, *names)
    for name, pair in zip(names, pairs, strict=True):
        served.check(name, expected(served, *pair))
    served.check(single, expected(served, ("w", 1.0)))
    assert not served.engine.engine._gathering


def test_who_needs_no_load_does_not_wait_for_who_does(served):
    cold = served.submit(PROMPT, ("w", 1.0), ("x", 1.0))
    warm = served.submit(PROMPT, ("y", 1.0), ("z", 1.0))
    served.engine.run()
    served.check(warm, expected(served, ("y", 1.0), ("z", 1.0)))
    settle(served, cold)
    served.check(cold, expected(served, ("w", 1.0), ("x", 1.0)))


@pytest.mark.parametrize("aborted", [0, 1])
def test_an_abort_passes_the_turn_on(aborted, served):
    names = [served.submit(PROMPT, ("z", 1.0), (other, 1.0)) for other in "wx"]
    served.engine.abort(names[aborted])
    [left] = [name for name in names if name != names[aborted]]
    settle(served, left)
    served.check(left, expected(served, ("z", 1.0), ("wx"[1 - aborted], 1.0)))
    for adapter_id in served.ids.values():
        served.engine.unload(adapter_id)
    assert served.engine.host.ready() == []


def test_an_adapter_that_is_lost_ends_its_requests_and_no_others(zoo, serve, tmp_path):
    served = serve("a", "b")
    served.engine.engine.handle(LoadAdapter(9, str(tmp_path / "nothing")))
    served.ids["lost"] = 9
    lost = [served.submit(PROMPT, ("a", 1.0), ("lost", 1.0)) for _ in range(2)]
    kept = served.submit(PROMPT, ("a", 1.0), ("b", 1.0))
    served.engine.wait_for_load()
    served.engine.run()
    for name in lost:
        assert served.engine.received[name].finish_reason is FinishReason.ERROR
    served.check(kept, expected(served, ("a", 1.0), ("b", 1.0)))


def test_an_adapter_of_a_sum_is_unloaded_when_the_sum_has_ended(zoo, serve):
    served = serve("a", "b")
    name = served.submit(PROMPT, ("a", 1.0), ("b", 1.0))
    served.engine.step()
    served.engine.unload(served.ids["b"])
    late = served.submit(PROMPT, ("a", 1.0), ("b", 1.0))
    assert AdapterUnloaded(served.ids["b"]) not in served.engine.adapter_events
    served.engine.run()
    served.check(name, expected(served, ("a", 1.0), ("b", 1.0)))
    assert "not loaded" in served.engine.received[late].error
    assert served.engine.adapter_events[-1] == AdapterUnloaded(served.ids["b"])


def test_adapters_that_are_too_large_together_are_refused_at_once(zoo, serve):
    """The others go on, each adapter alone too."""
    one, two = (takes(serve(name), name) for name in ("a", "b"))
    pages = -(-(one.device_bytes + two.device_bytes) // PAGE)
    host = one.host_bytes + two.host_bytes - 1
    prompt, count = PROMPT[:3], 2
    for changes, option in (
        ({"memory_budget": (pages + 15) * PAGE, "block_size": 1}, "--memory-budget"),
        ({"host_memory_budget": host}, "--host-memory-budget"),
    ):
        served = serve("b", "a", **changes)
        running = served.submit(prompt, ("a", 1.0), count=count)
        both = served.submit(prompt, ("a", 1.0), ("b", 1.0), count=count)
        alone = served.submit(prompt, ("b", 1.0), count=count)
        served.engine.collect()
        assert option in served.engine.received[both].error
        settle(served, running, alone)
        for name, adapter in ((running, "a"), (alone, "b")):
            served.check(name, changed(zoo, [(adapter, 1.0)]).generate(prompt, count))


# --- the device


def test_a_sum_that_waits_for_room_keeps_out_none_of_its_members(alike):
    """The device has room for two adapters and one is in use: another may join it."""
    one = Served(alike, "w")
    size = takes(one, "w").device_bytes
    one.engine.close()
    # Two of them beside two prompts, and not three.
    pages = 2 * size // PAGE + 2 * len(PROMPT) + size // PAGE // 2
    served = Served(alike, memory_budget=pages * PAGE, block_size=1)
    running = served.submit(PROMPT, ("y", 1.0), count=12)
    served.engine.step()
    both = served.submit(PROMPT, ("w", 1.0), ("x", 1.0))
    alone = served.submit(PROMPT, ("x", 1.0))
    served.engine.step()
    assert len(served.engine.received[alone].token_ids) == 1
    assert not served.engine.received[both].token_ids
    served.engine.run()
    served.check(running, changed(alike, [("y", 1.0)]).generate(PROMPT, 12))
    served.check(both, expected(served, ("w", 1.0), ("x", 1.0)))
    served.check(alone, expected(served, ("x", 1.0)))
    served.engine.close()


TARGET = LinearTarget("m", 0, 4, 16, False)


def biased(*lengths: int) -> LoweredAdapter:
    """One tensor of so many bytes for each length."""
    parts = tuple(
        Part(EveryPosition(), (Affine(TARGET, bias=torch.zeros(length // 4)),))
        for length in lengths
    )
    return LoweredAdapter("d", "lora", "peft", parts)


def test_a_group_that_fits_is_held_wherever_its_members_lay(zoo):
    """An idle adapter in the middle must not keep the other one of its request out."""
    layout = EngineHarness(engine_config(zoo.model)).engine._layout
    pool = AdapterPool(layout, 8, torch.empty(640, dtype=torch.uint8), torch.float32)
    adapters = {1: biased(256), 2: biased(64), 3: biased(512)}
    residency = Residency(pool, adapters.__getitem__)
    assert residency.acquire(1)
    assert residency.acquire(2)
    for held in (1, 2):
        residency.release(held)
    assert residency.acquire(2, 3)
    residency.check_integrity()
    assert sorted(residency.resident()) == [2, 3]
    assert not residency.acquire(2, 1)
    for held in (2, 3):
        residency.release(held)
    residency.check_integrity()
    assert residency.acquire(2, 1)


# --- cost


class Recording:
    """Operations that note which of them were called."""

    def __init__(self, ops: DeltaOps):
        self.calls: list[str] = []
        self.ops = DeltaOps(
            **{
                each.name: self._recorded(each.name, getattr(ops, each.name))
                for each in fields(DeltaOps)
            }
        )

    def _recorded(self, name: str, op):
        def call(*args):
            self.calls.append(name)
            return op(*args)

        return call


@pytest.fixture
def recorded(serve, monkeypatch):
    """(requests' adapters) -> the calls of one decode step, and the corrections of its pass."""

    def calls(*asked: Chosen) -> tuple[list[str], list[object]]:
        served = serve()
        for index, chosen in enumerate(asked):
            served.submit(tokens(9, index), *chosen)
        served.engine.step()  # the prompts
        runner = served.engine.engine._runner
        recording = Recording(runner._ops)
        runner._ops = recording.ops
        passed: list[object] = []
        forward = Decoder.forward
        with monkeypatch.context() as patch:
            patch.setattr(
                Decoder,
                "forward",
                lambda self, *args: passed.append(args[-1]) or forward(self, *args),
            )
            served.engine.step()
        return recording.calls, passed

    return calls


LAYERS, PLACES_OF_B = 2, 4
"""GEMMs of a layer: q, k and v in one, o, gate and up in one, down."""


def test_a_batch_of_the_base_takes_the_plain_path(recorded):
    calls, passed = recorded([], [], [("prefix5", 1.0)])
    assert (calls, passed) == ([], [None])


def test_all_loras_of_a_batch_are_one_call_a_place(recorded):
    assert recorded([("a", 1.0)])[0] == ["correct_affine"] * LAYERS
    calls, _ = recorded([("a", 1.0)], [], [("b", 1.0)], [("c", 1.0)], [("a", 0.5)])
    assert calls == ["correct_affine"] * LAYERS * PLACES_OF_B


def test_a_sum_costs_a_call_for_each_of_its_members_in_turn(recorded):
    calls, _ = recorded([("a", 1.0), ("c", 1.0)], [("c", 1.0)])
    assert calls == ["correct_affine"] * 2 * LAYERS * 2


def test_kinds_cost_their_own_calls_alone(recorded):
    calls, _ = recorded([("a", 1.0)], [("lokr", 1.0)], [("bottleneck", 1.0)])
    assert sorted(calls) == sorted(
        LAYERS * ["correct_affine", *["add_kronecker"] * PLACES_OF_B, "add_bottleneck"]
    )


# --- over HTTP


def test_a_running_server_sums_and_refuses(zoo, tmp_path):
    [ia3] = [each for each in VARIANTS if each.name == "ia3"]
    folder = tmp_path / "adapters"
    folder.mkdir()
    for name in ("a", "b", "prefix5", "alora"):
        (folder / name).symlink_to(zoo.saved[name], target_is_directory=True)
    zoo.oracle.save(ia3, folder / "ia3", 0)
    options = ("--served-model-name", "base", "--adapter-dir", str(folder), "--dtype", "float32")
    options = (*options, "--memory-budget", "16MiB")
    wanted = changed(zoo, [("a", 0.5), ("b", 0.5)]).generate(PROMPT, COUNT)

    def ask(http, *chosen):
        adapters = [{"name": name, "weight": weight} for name, weight in chosen]
        body = {"model": "base", "prompt": PROMPT, "max_tokens": COUNT, "temperature": 0}
        body |= {"adapters": adapters, "ignore_eos": True, "return_token_ids": True}
        return http.post("/v1/completions", json=body)

    with (
        running_server(zoo.model, *options, log=tmp_path / "log") as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        [choice] = ask(http, ("a", 0.5), ("b", 0.5)).json()["choices"]
        assert choice["token_ids"] == wanted.token_ids
        for chosen in ([("a", 1.0), ("ia3", 1.0)], [("prefix5", 0.5)], [("a", 1.0), ("a", 1.0)]):
            refused = ask(http, *chosen)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "adapters")
        assert ask(http, ("a", 1.0), ("base", 1.0)).status_code == 404
        assert http.delete("/v1/adapters/b").status_code == 200
        assert ask(http, ("a", 1.0), ("b", 1.0)).status_code == 404
        assert ask(http, ("a", 1.0)).status_code == 200
