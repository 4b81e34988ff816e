"""Save adapters with AdapterHub's library and record what the library itself computes with them.

The library, ``adapters`` 1.3.0, needs transformers 4.57 and so an environment of its own::

    pip install torch==2.13.0 adapters==1.3.0 transformers==4.57.6 safetensors
    python tests/golden/make_adapterhub.py --bases BASES --out tests/golden

``BASES`` holds a folder per family: ``llama``, ``qwen2``, ``qwen3``, ``gpt2`` as
``tests/tiny_models.py`` makes them (in the project's environment), and ``smollm2`` with the demo
base. Every value is of the adapter as saved and loaded again into a fresh base: float32, one
request alone, no padding, eager attention, no KV cache. Those are the conditions under which the
library is free of its known defects.
"""

import argparse
import json
import logging
import shutil
import sys
import tempfile
import types
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from adapterhub_draw import decay, draw, require_random
from adapterhub_refused import FIRST, REFUSED, SECOND, Refused, allow_prompt_tuning
from adapterhub_variants import VARIANTS, Variant
from adapters.composition import Fuse
from adapters.methods import modeling
from adapters.methods.reft import ReftLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import adapters
from adapters import AutoAdapterModel

ADAPTER = "foo"
MAX_TOKENS = 10
SURE = 2e-3
"""Least gap of log-probability between the greedy token and the next."""
FIRST_PLAIN_TOKEN = 3
ATTEMPTS = 100
LEAST_CHANGE = 0.3
DIGITS = 5
NOISE = 2e-4
"""Of float32, between two lengths of a sequence."""
LARGEST_LOGIT = 60.0


@dataclass(frozen=True)
class Expected:
    """A list per prompt; ``prompt_logprobs`` starts at the second token of the prompt."""

    prompts: list[list[int]]
    tokens: list[list[int]]
    logprobs: list[list[float]]
    prompt_logprobs: list[list[float]]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), separators=(",", ":")) + "\n")


@dataclass(frozen=True)
class Run:
    tokens: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float]
    gap: float
    largest: float


class Bases:
    """Fresh base models, by family."""

    def __init__(self, folder: Path):
        self._folder = folder

    def fresh(self, family: str) -> PreTrainedModel:
        """A base in float32, which the library can put adapters on."""
        model = self.load(family, AutoModelForCausalLM)
        adapters.init(model)
        return model

    def load(self, family: str, model_class: type[Any]) -> PreTrainedModel:
        """A base in float32, as a model of this class."""
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch) / family
            self._copy(family, copy)
            model = model_class.from_pretrained(
                copy, dtype=torch.float32, attn_implementation="eager"
            )
        # The library writes this name into each configuration: no path of this machine there.
        model.config._name_or_path = f"tiny-{family}" if family != "smollm2" else family
        return model.eval()

    def _copy(self, family: str, copy: Path) -> None:
        """Link the weights; transformers 4 reads ``rope_theta`` at the top of the configuration."""
        copy.mkdir()
        for file in (self._folder / family).iterdir():
            (copy / file.name).symlink_to(file.resolve())
        config = json.loads((copy / "config.json").read_text())
        if "rope_parameters" in config:
            config["rope_theta"] = config["rope_parameters"]["rope_theta"]
        (copy / "config.json").unlink()
        (copy / "config.json").write_text(json.dumps(config))


def stand_in_for_torchvision() -> None:
    """AdapterPlus wants torchvision's StochasticDepth, which is the identity in inference."""
    module = types.ModuleType("torchvision.ops.stochastic_depth")
    module.StochasticDepth = lambda p, mode: nn.Identity()
    sys.modules["torchvision"] = types.ModuleType("torchvision")
    sys.modules["torchvision.ops"] = types.ModuleType("torchvision.ops")
    sys.modules["torchvision.ops.stochastic_depth"] = module
    modeling.is_torchvision_available = lambda: True


def save(model: PreTrainedModel, variant: Variant, folder: Path) -> None:
    """Save the adapter with the library, as the variant says."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if variant.bf16:
        model.to(torch.bfloat16)
    model.save_adapter(
        str(folder), ADAPTER, with_head=variant.head, use_safetensors=variant.safetensors
    )
    if variant.version:
        path = folder / "adapter_config.json"
        config = {**json.loads(path.read_text()), "version": variant.version}
        path.write_text(json.dumps(config, indent=2, sort_keys=True))


def load(bases: Bases, variant: Variant, family: str, folder: Path) -> PreTrainedModel:
    """The saved adapter, active on a fresh base."""
    model = bases.fresh(family)
    name = model.load_adapter(
        str(folder), with_head=variant.head, use_safetensors=variant.safetensors
    )
    model.set_active_adapters(name)
    return model.eval()


def reft_sites(variant: Variant) -> tuple[int, int]:
    """Prefix and suffix positions of the ReFT among the configurations, or zeros."""
    for config in getattr(variant.config, "configs", [variant.config]):
        if config.architecture == "reft":
            return config.prefix_positions, config.suffix_positions
    return 0, 0


@contextmanager
def prompt_rows_only(length: int) -> Iterator[None]:
    """ReFT at the first ``length`` rows only, computed as if they were the whole sequence.

    What a decode with KV cache computes when the intervention ends with the prompt: layers are
    causal, so later rows change nothing of it.
    """
    whole = ReftLayer.forward

    def forward(layer: ReftLayer, hidden: Tensor) -> Tensor:
        return torch.cat([whole(layer, hidden[:, :length]), hidden[:, length:]], dim=1)

    ReftLayer.forward = forward
    try:
        yield
    finally:
        ReftLayer.forward = whole


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: list[int], max_tokens: int) -> Run:
    """Greedy tokens by full recomputation each step, the end token ignored."""
    ids, logprobs, gaps, largest = list(prompt), [], [], 0.0
    first: list[float] = []
    for _ in range(max_tokens):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
        rows = logits.log_softmax(-1)
        if not logprobs:
            first = rows[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
        best = rows[-1].topk(2)
        gaps.append(float(best.values[0] - best.values[1]))
        largest = max(largest, float(logits.abs().max()))
        logprobs.append(float(best.values[0]))
        ids.append(int(best.indices[0]))
    return Run(ids[len(prompt) :], logprobs, first, min(gaps), largest)


def run_variant(model: PreTrainedModel, variant: Variant, prompt: list[int]) -> Run:
    """The served convention: ReFT's suffix is the prompt's, and stays where it is."""
    prefix, suffix = reft_sites(variant)
    if suffix == 0:
        return greedy(model, prompt, MAX_TOKENS)
    # Shorter prompts: whether later tokens are still in the prefix is left open, so one token.
    max_tokens = MAX_TOKENS if len(prompt) >= prefix else 1
    with prompt_rows_only(len(prompt)):
        return greedy(model, prompt, max_tokens)


def record(model: PreTrainedModel, base: PreTrainedModel, variant: Variant, seed: int) -> Expected:
    """Run prompts of the variant's lengths."""
    found = [
        sure_run(model, base, variant, length, seed + 1000 * index)
        for index, length in enumerate(variant.lengths)
    ]
    return as_expected([prompt for prompt, _ in found], [run for _, run in found])


def as_expected(prompts: list[list[int]], runs: list[Run]) -> Expected:
    assert max(run.largest for run in runs) < LARGEST_LOGIT
    return Expected(
        prompts,
        [run.tokens for run in runs],
        [[round(value, DIGITS) for value in run.logprobs] for run in runs],
        [[round(value, DIGITS) for value in run.prompt_logprobs] for run in runs],
    )


def sure_run(
    model: PreTrainedModel, base: PreTrainedModel, variant: Variant, length: int, seed: int
) -> tuple[list[int], Run]:
    """A prompt whose greedy tokens are beyond doubt, and not the base's."""
    for attempt in range(ATTEMPTS):
        generator = torch.Generator().manual_seed(seed + attempt)
        top = model.config.vocab_size
        prompt = torch.randint(FIRST_PLAIN_TOKEN, top, (length,), generator=generator).tolist()
        run = run_variant(model, variant, prompt)
        if run.gap >= SURE and run.tokens != greedy(base, prompt, len(run.tokens)).tokens:
            return prompt, run
    raise AssertionError(f"{variant.name}: no prompt of {length} tokens shows it")


def require_causal(model: PreTrainedModel, variant: Variant, expected: Expected) -> None:
    """Later tokens change nothing of earlier ones: a KV cache may serve it."""
    if reft_sites(variant)[1]:
        return
    prompt = expected.prompts[-1]
    for length, wanted in enumerate(expected.prompt_logprobs[-1], 2):
        shorter = greedy(model, prompt[:length], 1).prompt_logprobs
        assert abs(shorter[-1] - wanted) < NOISE, (length, shorter[-1], wanted)


def largest_change(base: PreTrainedModel, expected: Expected) -> float:
    """Of a prompt's log-probability, by the adapter."""
    changes = []
    for prompt, wanted in zip(expected.prompts, expected.prompt_logprobs, strict=True):
        plain = greedy(base, prompt, 1).prompt_logprobs
        changes += [abs(a - b) for a, b in zip(plain, wanted, strict=True)]
    return max(changes)


def make(bases: Bases, variant: Variant, family: str, folder: Path) -> str:
    """Make one golden folder; returns a line that says how much it does."""
    seed = zlib.crc32(f"{family}/{variant.name}".encode())
    torch.manual_seed(seed)
    model = bases.fresh(family)
    model.add_adapter(ADAPTER, config=variant.config)
    draw(model, seed, variant.size)
    if variant.decayed:
        decay(model)
    if variant.trained_head:
        with torch.no_grad():
            model.lm_head.weight.add_(0.05 * torch.randn(model.lm_head.weight.shape))
    model.set_active_adapters(ADAPTER)
    save(model, variant, folder)
    require_random(folder)
    loaded = load(bases, variant, family, folder)
    base = bases.fresh(family)
    expected = record(loaded, base, variant, seed)
    require_causal(loaded, variant, expected)
    if variant.live_differs:
        record_live(model.eval(), variant, expected).write(folder / "expected_live.json")
    elif not (variant.bf16 or variant.version):
        require_as_live(model.eval(), variant, expected)
    change = largest_change(base, expected)
    assert change > LEAST_CHANGE, change
    expected.write(folder / "expected.json")
    return f"largest change {change:.2f}"


def require_as_live(live: PreTrainedModel, variant: Variant, expected: Expected) -> None:
    """Saving and loading changed nothing."""
    wanted = expected.prompt_logprobs[-1]
    got = run_variant(live, variant, expected.prompts[-1]).prompt_logprobs
    torch.testing.assert_close(torch.tensor(got), torch.tensor(wanted), atol=2e-5, rtol=0)


def record_live(live: PreTrainedModel, variant: Variant, expected: Expected) -> Expected:
    """The same prompts before saving, where the library loses a field of the configuration."""
    runs = [run_variant(live, variant, prompt) for prompt in expected.prompts]
    found = as_expected(expected.prompts, runs)
    assert found.prompt_logprobs != expected.prompt_logprobs
    return found


def make_refused(bases: Bases, refused: Refused, folder: Path) -> None:
    torch.manual_seed(0)
    model = base_of_refused(bases, refused.family)
    names = (FIRST, SECOND)[: len(refused.configs)]
    for name, config in zip(names, refused.configs, strict=True):
        model.add_adapter(name, config=config)
    if refused.name == "fusion":
        model.add_adapter_fusion(Fuse(*names))
    draw(model, zlib.crc32(refused.name.encode()))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    refused.save(model, folder)


def base_of_refused(bases: Bases, family: str) -> PreTrainedModel:
    if family == "llama_adapter_model":
        return bases.load("llama", AutoAdapterModel)
    if family == "qwen2_prompt_tuning":
        model = bases.load("qwen2", AutoModelForCausalLM)
        allow_prompt_tuning(model)
        return model
    return bases.fresh(family)


def require_failure(bases: Bases, variant: Variant, family: str, folder: Path) -> str:
    """The library cannot do this variant on this base; returns the error's name."""
    error = variant.cannot[family]
    with suppress(error):
        make(bases, variant, family, folder)
        raise AssertionError(f"the library can do {variant.name} on {family}")
    shutil.rmtree(folder, ignore_errors=True)
    return f"the library fails with {error.__name__}"


def say(line: str) -> None:
    sys.stderr.write(line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bases", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="part of FAMILY/VARIANT")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    stand_in_for_torchvision()
    torch.set_num_threads(1)
    bases = Bases(options.bases)
    for variant in VARIANTS:
        for family in (*variant.families, *variant.cannot):
            folder = options.out / "adapterhub" / family / variant.name
            if options.only not in f"{family}/{variant.name}":
                continue
            if family in variant.cannot:
                done = require_failure(bases, variant, family, folder)
            else:
                done = make(bases, variant, family, folder)
            say(f"{family}/{variant.name}: {done}")
    for refused in REFUSED:
        if options.only in f"refused/{refused.name}":
            make_refused(bases, refused, options.out / "adapterhub_refused" / refused.name)
            say(f"refused/{refused.name}")


if __name__ == "__main__":
    main()
