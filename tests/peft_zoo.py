"""The PEFT zoo: random adapters of every kind of PEFT 0.21.2, made, saved and run by PEFT itself.

A test takes a ``Variant``, lets ``PeftOracle.save`` write it for a base, serves the folder, and
compares with ``PeftOracle.generate``. Nothing of deltamux is imported: this is the other opinion.
"""

import copy
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

import peft
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.boft import layer as boft_layer
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.arrow import create_arrow_model
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, VeloraConfig
from peft.tuners.lora.variants import QALoraLinearVariant
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

OPTIONS_FILE = "deltamux.json"
KINDS = {config: kind.value.lower() for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
FAMILIES = frozenset({"llama", "qwen2", "qwen3", "gpt2"})
NO_GPT2 = FAMILIES - {"gpt2"}
"""For kinds that PEFT implements for nn.Linear, and not for GPT-2's Conv1D."""
TIED = FAMILIES - {"llama"}
"""Tiny bases whose lm_head is the embedding."""
BIASED = frozenset({"qwen2", "gpt2"})

LOWEST_EFFECT, HIGHEST_EFFECT = 0.4, 1.5
"""What an adapter does to the logits: RMS of the difference over the deviation of the base's."""
WANTED_TURNED = 0.5
"""Share of the positions whose likeliest token it should change."""
MAX_TRIALS = 12
PROBE_LENGTH, PROBE_ROWS = 16, 8

QUIETED = (
    # about training or merging
    r"`is_gradient_checkpointing` is deprecated",
    r"`lora_bias=True` was passed",
    r"(PiSSA|OLoRA) changes the base weights of the model",
    r"lora with eva initialization used with low_cpu_mem_usage=False",
    r"The symmetric initialization can NOT be performed when r is odd",
    # about what is so on purpose
    r"Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`",
    r"Model has `tie_word_embeddings=True` and a tied layer is part of the adapter",
    r"You have requested `ensure_weight_tying`, but no tied modules are added",
    r"Specified to not (save|load) (vera_A and vera_B|basis_A and basis_B)",
    r"fan_in_fan_out is set to (True|False) but the target module is",
    r"Unsupported layer type '<class '.*Norm'>' encountered",
    # bias vectors and modules pruned to rank 0 are taken for torn matrices
    r"Adapter 'default': \d+ LoRA tensor\(s\) have invalid shape",
    # AdaLoRA's patterns name tensors, and are read as if they named modules
    r"The following rank_pattern keys did not match any targeted module",
    # from torch, of SHiRA's sparse matrices
    r"Sparse invariant checks are implicitly disabled",
)
"""What PEFT says of adapters that it then saves, loads and runs as it should."""


@dataclass(frozen=True)
class Names:
    """A field's value that differs where modules are called otherwise."""

    usual: object
    gpt2: object


QV = Names(["q_proj", "v_proj"], ["c_attn"])
LINEAR = Names(
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ["c_attn", "c_proj", "c_fc"],
)

Configure = Callable[[str, PreTrainedModel], PeftConfig]
Build = Callable[[PreTrainedModel, PeftConfig, Path], PeftModel]
Write = Callable[[PeftModel, Path], Path]


def _write(model: PeftModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def _build(base: PreTrainedModel, config: PeftConfig, folder: Path) -> PeftModel:
    return get_peft_model(base, config)


@dataclass(frozen=True)
class Variant:
    """One realistic way of using one kind.

    Attributes:
        name: Unique.
        kind: PEFT's ``peft_type``, lower-case.
        families: Where PEFT itself saves, reloads and runs it.
        config: (family, base) -> configuration.
        options: Of the one who serves it, written to ``deltamux.json``.
        prompt_tokens: Must stand in the prompt, or the adapter does little or nothing.
        build: Puts the adapter on a base of its own; the folder is the one to be written.
        finish: What the library does to a trained adapter before it is saved.
        write: Saves, and returns the folder with ``adapter_config.json``.
        served: False for what deltamux refuses by name.
    """

    name: str
    kind: str
    families: frozenset[str]
    config: Configure
    options: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    prompt_tokens: tuple[int, ...] = ()
    build: Build = _build
    finish: Callable[[PeftModel], None] | None = None
    write: Write = _write
    served: bool = True

    def prompt(self, tokens: list[int]) -> list[int]:
        """``tokens`` with ``prompt_tokens`` in the middle."""
        middle = len(tokens) // 2
        return [*tokens[:middle], *self.prompt_tokens, *tokens[middle:]]


@dataclass(frozen=True)
class Generation:
    """Greedy tokens, their log-probabilities, and how far each was ahead of the second."""

    token_ids: list[int]
    logprobs: list[float]
    leads: list[float]


class PeftOracle:
    """A base, and what PEFT makes of it with any adapter. The base itself is never touched."""

    def __init__(self, base: Path, dtype: torch.dtype = torch.float32):
        self.model = AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype, attn_implementation="eager"
        ).eval()
        model_type = self.model.config.model_type
        self.family = model_type if model_type in FAMILIES else "llama"

    def save(self, variant: Variant, folder: Path, seed: int) -> Path:
        """Save a random adapter that changes the logits clearly: its folder."""
        with _peft(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = variant.config(self.family, self.model)
            model = variant.build(copy.deepcopy(self.model), config, folder).eval()
            moves = _draw(model)
            size = self._size(model, moves, variant) if variant.served else 0.3
            _apply(moves, size)
            if variant.finish is not None:
                variant.finish(model)
            written = variant.write(model, folder)
        if variant.options:
            (written / OPTIONS_FILE).write_text(json.dumps(dict(variant.options)), encoding="utf-8")
        return written

    def load(self, adapter: Path) -> PeftModel:
        """The base with the saved adapter, on a copy."""
        with _peft(), torch.random.fork_rng(devices=[]):
            config = PeftConfig.from_pretrained(adapter)
            _register_qalora(config)
            return PeftModel.from_pretrained(
                copy.deepcopy(self.model), adapter, config=config
            ).eval()

    def generate(
        self, prompt: list[int], max_tokens: int, adapter: Path | None = None
    ) -> Generation:
        """Greedy tokens of this request alone, everything computed again for each of them."""
        model, options = self._model(adapter)
        found = Generation([], [], [])
        for _ in range(max_tokens):
            logits = _logits(model, [*prompt, *found.token_ids], len(prompt), options)
            row = logits[-1].log_softmax(-1)
            first, second = row.topk(2).values.tolist()
            found.token_ids.append(int(row.argmax()))
            found.logprobs.append(first)
            found.leads.append(first - second)
        return found

    def prompt_logprobs(self, prompt: list[int], adapter: Path | None = None) -> Tensor:
        """Log-probabilities (len(prompt) - 1,) of every prompt token but the first."""
        model, options = self._model(adapter)
        rows = _logits(model, prompt, len(prompt), options)[:-1].log_softmax(-1)
        return rows.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]

    def hidden(self, prompt: list[int], adapter: Path | None = None) -> Tensor:
        """(hidden,): the last token's state behind the final norm."""
        model, options = self._model(adapter)
        out = _outputs(model, prompt, len(prompt), options, output_hidden_states=True)
        return out.hidden_states[-1][0, -1].float()

    def _model(self, adapter: Path | None) -> tuple[nn.Module, Mapping[str, Any]]:
        if adapter is None:
            return self.model, {}
        options = adapter / OPTIONS_FILE
        read = json.loads(options.read_text(encoding="utf-8")) if options.exists() else {}
        return self.load(adapter), read

    def _size(self, model: PeftModel, moves: list["_Move"], variant: Variant) -> float:
        """The size of the moves that puts the effect between its bounds."""
        probe = torch.randint(self.model.config.vocab_size, (PROBE_LENGTH,)).tolist()
        prompt = variant.prompt(probe)
        base = _logits(self.model, prompt, len(prompt), {})[-PROBE_ROWS:]
        highest = math.inf if model.active_peft_config.is_prompt_learning else HIGHEST_EFFECT
        least, most = 0.0, math.inf
        size = 0.5
        fair: dict[float, float] = {}  # size -> share turned
        for _ in range(MAX_TRIALS):
            _apply(moves, size)
            rows = _logits(model, prompt, len(prompt), variant.options)[-PROBE_ROWS:]
            effect = float((rows - base).square().mean().sqrt() / base.std())
            if LOWEST_EFFECT <= effect <= highest:
                fair[size] = float((rows.argmax(-1) != base.argmax(-1)).float().mean())
                if fair[size] >= WANTED_TURNED:
                    return size
            least, most = (least, size) if effect > highest else (size, most)
            size = 2 * size if most == math.inf else (least + most) / 2
        if not any(fair.values()):
            raise AssertionError(f"no size of {variant.name} has a fair effect, {size} the last")
        return max(fair, key=fair.__getitem__)


@dataclass(frozen=True)
class _Move:
    """parameter = start + size · step"""

    parameter: nn.Parameter
    start: Tensor
    step: Tensor


def _draw(model: PeftModel) -> list[_Move]:
    """A random direction for every trainable parameter, of the length that suits it."""
    moves = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            start = parameter.detach().clone()
            usual = parameter.shape[-1] ** -0.5
            scale = max(float(start.float().square().mean().sqrt()), usual)
            moves.append(_Move(parameter, start, torch.randn_like(start) * scale))
    if not moves:
        raise AssertionError("the adapter has no trainable parameter")
    return moves


@torch.no_grad()
def _apply(moves: list[_Move], size: float) -> None:
    for move in moves:
        move.parameter.copy_(move.start + size * move.step)


def _logits(
    model: nn.Module, tokens: list[int], prompt_length: int, options: Mapping[str, Any]
) -> Tensor:
    """Float32 logits (len(tokens), vocabulary), those of virtual tokens left out."""
    return _outputs(model, tokens, prompt_length, options).logits[0, -len(tokens) :].float()


@torch.inference_mode()
def _outputs(
    model: nn.Module,
    tokens: list[int],
    prompt_length: int,
    options: Mapping[str, Any],
    **extra: Any,
) -> CausalLMOutput:
    if isinstance(model, PeftModel):
        if "task_id" in options:
            extra["task_ids"] = torch.tensor([options["task_id"]])
        wanted = getattr(model.active_peft_config, "alora_invocation_tokens", None)
        if wanted is not None:
            start = _last_occurrence(wanted, tokens[:prompt_length])
            extra["alora_offsets"] = [None if start is None else len(tokens) - start]
    with _peft():
        return model(input_ids=torch.tensor([tokens]), use_cache=False, **extra)


def _last_occurrence(wanted: list[int], tokens: list[int]) -> int | None:
    starts = range(len(tokens) - len(wanted), -1, -1)
    return next((s for s in starts if tokens[s : s + len(wanted)] == wanted), None)


@contextmanager
def _peft() -> Iterator[None]:
    """PEFT as it is on a machine with its CUDA extension, and its known warnings quiet."""
    with warnings.catch_warnings():
        for message in QUIETED:
            warnings.filterwarnings("ignore", message=message)
        with mock.patch.object(boft_layer, "_FBD_CUDA", _BlockDiagonal()):
            yield


class _BlockDiagonal:
    """What BOFT's CUDA extension computes; without it PEFT drops the butterfly factors."""

    def forward(self, blocks: Tensor) -> list[Tensor]:
        """(factors, blocks, size, size) -> [(factors, blocks · size, blocks · size)]"""
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]


class _QALoraLinear(LoraLinear):
    """QALoRA's own forward pass, which PEFT wires up for GPTQ layers only, on a plain Linear."""

    def resolve_lora_variant(self, *, config: LoraConfig, **_: Any) -> QALoraLinearVariant:
        return QALoraLinearVariant()


def _register_qalora(config: PeftConfig) -> None:
    if getattr(config, "use_qalora", False):
        config._register_custom_module({nn.Linear: _QALoraLinear})


def _kind(
    config_class: type[PeftConfig], variants: dict[str, dict[str, Any]], **shared: Any
) -> tuple[Variant, ...]:
    """Variants of one kind by name; what is no field of ``Variant`` is the configuration's."""
    return tuple(
        _variant(name, config_class, {**shared, **fields}) for name, fields in variants.items()
    )


_VARIANT_FIELDS = {"families", "options", "prompt_tokens", "build", "finish", "write", "served"}


def _variant(name: str, config_class: type[PeftConfig], fields: dict[str, Any]) -> Variant:
    own = {key: fields.pop(key) for key in _VARIANT_FIELDS & fields.keys()}

    def configure(family: str, base: PreTrainedModel) -> PeftConfig:
        values = {key: _value(value, family, base) for key, value in fields.items()}
        config = config_class(task_type="CAUSAL_LM", **values)
        _register_qalora(config)
        return config

    return Variant(name, KINDS[config_class], own.pop("families", FAMILIES), configure, **own)


def _value(value: object, family: str, base: PreTrainedModel) -> object:
    if callable(value):
        return value(base)
    if isinstance(value, Names):
        value = value.gpt2 if family == "gpt2" else value.usual
    return copy.deepcopy(value)


def _build_converted(base: PreTrainedModel, config: PeftConfig, folder: Path) -> PeftModel:
    """As PEFT's documentation says: the untrained adapter is saved first, to be subtracted."""
    model = get_peft_model(base, config)
    mutating = config.init_lora_weights
    config.init_lora_weights = True
    model.save_pretrained(_untrained(folder))
    config.init_lora_weights = mutating
    return model


def _write_converted(model: PeftModel, folder: Path) -> Path:
    model.save_pretrained(folder, path_initial_model_for_weight_conversion=_untrained(folder))
    return folder


def _untrained(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-untrained")


def _prune(model: PeftModel) -> None:
    """Two steps of AdaLoRA's own training loop, the second of which allocates the ranks."""
    config = model.active_peft_config
    tokens = torch.arange(3, 19)[None]
    for step in (1, config.total_step - config.tfinal):
        model(input_ids=tokens, labels=tokens).loss.backward()
        model.base_model.update_and_allocate(step)
        model.zero_grad()


def _build_xlora(base: PreTrainedModel, config: PeftConfig, folder: Path) -> PeftModel:
    for name, seed in (("first", 1), ("second", 2)):
        config.adapters[name] = str(_save_expert(base, folder / name, seed))
    base.config.use_cache = False
    return get_peft_model(base, config)


def _build_arrow(base: PreTrainedModel, config: PeftConfig, folder: Path) -> PeftModel:
    experts = [str(_save_expert(base, folder / f"expert-{seed}", seed)) for seed in (1, 2)]
    return create_arrow_model(base, experts, config.arrow_config)


def _write_router(model: PeftModel, folder: Path) -> Path:
    model.save_pretrained(folder, selected_adapters=["arrow_router"])
    return folder / "arrow_router"


def _save_expert(base: PreTrainedModel, folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(copy.deepcopy(base), config).save_pretrained(folder)
    return folder


TOKENS = [17, 3, 250, 4, 99]
"""In no order, as people write them; they must stand in the prompt to show."""
INVOCATION = [31, 7, 7, 12]
CPT_TOKENS = [(7 * i) % 97 + 3 for i in range(19)]
EMBEDDING = Names(["embed_tokens"], ["wte"])
QV_AND_EMBEDDING = Names(["q_proj", "v_proj", "embed_tokens"], ["c_attn", "wte"])
CONVERTED = {"build": _build_converted, "write": _write_converted}
BLOCKS = BdLoraConfig(
    target_modules_bd_a=["o_proj", "down_proj"],
    target_modules_bd_b=["q_proj", "k_proj", "v_proj", "up_proj"],
    nblocks=2,
    match_strict=False,
)

LORA = _kind(
    LoraConfig,
    {
        "lora": {"lora_dropout": 0.1},
        "lora-default-targets": {"target_modules": None},
        "lora-gaussian": {"init_lora_weights": "gaussian", "target_modules": LINEAR},
        "lora-rslora": {"use_rslora": True, "r": 7, "target_modules": LINEAR},
        "lora-patterns": {
            "target_modules": LINEAR,
            "rank_pattern": Names(
                {"v_proj": 9, r".*\.0\.mlp\..*": 3}, {"attn.c_proj": 9, r".*\.0\.mlp\..*": 3}
            ),
            "alpha_pattern": Names(
                {"^model.layers.0.self_attn.q_proj": 5, "mlp.up_proj": 1},
                {"^transformer.h.0.attn.c_attn": 5, "mlp.c_fc": 1},
            ),
        },
        "lora-rslora-patterns": {
            "use_rslora": True,
            "rank_pattern": Names({"q_proj": 8}, {"c_attn": 8}),
        },
        "lora-bias-vector": {"lora_bias": True, "target_modules": LINEAR},
        "lora-all-linear": {"target_modules": "all-linear"},
        "lora-regex": {
            "target_modules": Names(r".*\.1\..*(q|up)_proj", r".*h\.1\..*c_(attn|fc)"),
        },
        "lora-exclude": {
            "target_modules": LINEAR,
            "exclude_modules": Names(["k_proj"], ["mlp.c_proj"]),
        },
        "lora-layers": {"target_modules": LINEAR, "layers_to_transform": [1]},
        "lora-layers-pattern": {
            "target_modules": LINEAR,
            "layers_to_transform": 0,
            "layers_pattern": Names("layers", "h"),
        },
        "lora-bias-all": {"bias": "all", "families": BIASED},
        "lora-bias-only": {"bias": "lora_only", "families": BIASED},
        "lora-head": {"target_modules": Names(["q_proj", "lm_head"], ["c_attn", "lm_head"])},
        "lora-embedding": {"target_modules": QV_AND_EMBEDDING},
        "lora-embedding-tied": {
            "target_modules": QV_AND_EMBEDDING,
            "ensure_weight_tying": True,
            "families": TIED,
        },
        "lora-save-norm": {
            "modules_to_save": Names(["norm", "input_layernorm"], ["ln_f", "ln_1"]),
        },
        "lora-save-head": {"modules_to_save": ["lm_head"]},
        "lora-save-embedding": {"modules_to_save": EMBEDDING},
        "lora-save-both": {
            "modules_to_save": Names(["embed_tokens", "lm_head"], ["wte", "lm_head"]),
        },
        "lora-save-tied": {
            "modules_to_save": EMBEDDING,
            "ensure_weight_tying": True,
            "families": TIED,
        },
        "lora-save-layer": {"modules_to_save": Names(["model.layers.1"], ["transformer.h.1"])},
        "lora-save-mlp": {"modules_to_save": ["mlp"]},
        "lora-tokens": {"trainable_token_indices": TOKENS, "prompt_tokens": tuple(TOKENS)},
        "lora-tokens-dict": {
            "trainable_token_indices": Names({"embed_tokens": TOKENS}, {"wte": TOKENS}),
            "prompt_tokens": tuple(TOKENS),
        },
        "lora-tokens-both": {
            "trainable_token_indices": Names(
                {"embed_tokens": TOKENS, "lm_head": [5, 2]}, {"wte": TOKENS, "lm_head": [5, 2]}
            ),
            "prompt_tokens": tuple(TOKENS),
        },
        "lora-parameters": {
            "target_modules": [],
            "target_parameters": Names(
                ["q_proj.weight", "mlp.up_proj.weight"], ["c_attn.weight", "attn.c_proj.weight"]
            ),
        },
        "lora-pissa": {"init_lora_weights": "pissa", "target_modules": LINEAR},
        "lora-olora": {
            "init_lora_weights": "olora",
            "target_modules": LINEAR,
            "families": NO_GPT2,
        },
        "lora-pissa-converted": {
            "init_lora_weights": "pissa",
            "target_modules": LINEAR,
            "rank_pattern": Names({"v_proj": 5}, {"attn.c_proj": 5}),
            **CONVERTED,
        },
        "lora-olora-converted": {
            "init_lora_weights": "olora",
            "use_rslora": True,
            "families": NO_GPT2,
            **CONVERTED,
        },
        "lora-mica": {"init_lora_weights": "mica"},
        "lora-orthogonal": {"init_lora_weights": "orthogonal"},
        "lora-eva": {"init_lora_weights": "eva", "eva_config": peft.EvaConfig()},
        "lora-velora": {"velora_config": VeloraConfig(num_groups=8)},
        "lora-kasa": {
            "kasa_config": KasaConfig(),
            "target_modules": LINEAR,
            "families": NO_GPT2,
        },
        "lora-bdlora": {"use_bdlora": BLOCKS, "target_modules": LINEAR, "families": NO_GPT2},
        "lora-qalora": {"use_qalora": True, "qalora_group_size": 8, "families": NO_GPT2},
        "lora-qalora-unused": {"use_qalora": True, "families": frozenset({"gpt2"})},
        "dora": {"use_dora": True, "target_modules": LINEAR},
        "dora-rslora": {
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": Names({"q_proj": 9}, {"c_attn": 9}),
        },
        "dora-bias-only": {"use_dora": True, "bias": "lora_only", "families": BIASED},
        "dora-embedding": {"use_dora": True, "target_modules": QV_AND_EMBEDDING},
        "dora-head": {"use_dora": True, "target_modules": ["lm_head"]},
        "alora": {
            "alora_invocation_tokens": INVOCATION,
            "prompt_tokens": tuple(INVOCATION),
            "target_modules": LINEAR,
        },
        "alora-one-token": {
            "alora_invocation_tokens": [2],
            "prompt_tokens": (2,),
            "use_rslora": True,
        },
        "alora-twice": {
            "alora_invocation_tokens": INVOCATION,
            "prompt_tokens": (*INVOCATION, 40, *INVOCATION),
        },
    },
    r=4,
    lora_alpha=6,
    target_modules=QV,
)
ADALORA = _kind(
    peft.AdaLoraConfig,
    {
        "adalora": {"target_modules": QV},
        "adalora-pruned": {"target_modules": LINEAR, "lora_alpha": 12, "finish": _prune},
    },
    init_r=6,
    target_r=3,
    total_step=10,
)
LOHA = _kind(
    peft.LoHaConfig,
    {
        "loha": {"r": 3, "alpha": 5, "target_modules": LINEAR},
        "loha-patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        "loha-save-norm": {"modules_to_save": ["norm"]},
    },
    r=4,
    target_modules=QV,
    families=NO_GPT2,
)
LOKR = _kind(
    peft.LoKrConfig,
    {
        "lokr": {"alpha": 5},
        "lokr-full": {"r": 40, "alpha": 30},
        "lokr-both": {"decompose_both": True},
        "lokr-factor": {"r": 3, "decompose_factor": 4},
        "lokr-patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"k_proj": 2}},
    },
    r=2,
    target_modules=LINEAR,
    families=NO_GPT2,
)
VERA = _kind(
    peft.VeraConfig,
    {"vera": {}, "vera-regenerated": {"save_projection": False, "projection_prng_key": 5}},
    r=12,
    target_modules=LINEAR,
)
VBLORA = _kind(
    peft.VBLoRAConfig,
    {"vblora": {}, "vblora-topk": {"topk": 3, "save_only_topk_weights": True}},
    num_vectors=20,
    vector_length=16,
    target_modules=LINEAR,
)
RANDLORA = _kind(
    peft.RandLoraConfig,
    {
        "randlora": {},
        "randlora-regenerated": {
            "save_projection": False,
            "projection_prng_key": 5,
            "target_modules": QV,
        },
        "randlora-sparse": {"sparse": True, "save_projection": False},
        "randlora-very-sparse": {"very_sparse": True},
    },
    r=6,
    randlora_alpha=10,
    target_modules=LINEAR,
)
POLY = _kind(
    peft.PolyConfig,
    {
        "poly-task-0": {"n_splits": 2, "options": {"task_id": 0}},
        "poly-task-1": {"target_modules": LINEAR, "options": {"task_id": 1}},
    },
    r=4,
    n_tasks=2,
    n_skills=3,
    families=NO_GPT2,
)
MISS = _kind(
    peft.MissConfig,
    {
        "miss": {},
        "miss-uneven": {"r": 7, "target_modules": QV},
        "miss-mini": {"mini_r": 4, "init_weights": "mini"},
        "miss-bat": {"init_weights": "bat"},
    },
    r=8,
    target_modules=LINEAR,
    families=NO_GPT2,
)
HRA = _kind(
    peft.HRAConfig,
    {
        "hra": {"target_modules": LINEAR},
        "hra-gram-schmidt": {"apply_GS": True, "target_modules": LINEAR},
        "hra-odd": {"r": 3},
        "hra-bias-only": {"bias": "hra_only", "families": frozenset({"qwen2"})},
    },
    r=4,
    families=NO_GPT2,
)
FOURIERFT = _kind(
    peft.FourierFTConfig,
    {
        "fourierft": {"target_modules": LINEAR},
        "fourierft-pattern": {
            "n_frequency_pattern": Names({"q_proj": 20}, {"c_attn": 20}),
            "scaling": 80.0,
            "random_loc_seed": 3,
        },
        "fourierft-bias-all": {"bias": "all", "families": BIASED},
    },
    n_frequency=50,
    init_weights=True,
    target_modules=QV,
)
SHIRA = _kind(
    peft.ShiraConfig,
    {
        "shira": {"r": 2, "target_modules": LINEAR},
        "shira-seed": {"r": 5, "random_seed": 9, "target_modules": QV},
    },
    families=NO_GPT2,
)
C3A = _kind(
    peft.C3AConfig,
    {"c3a": {}, "c3a-pattern": {"block_size_pattern": {"q_proj": 32, "down_proj": 8}}},
    block_size=16,
    target_modules=LINEAR,
    families=NO_GPT2,
)
OFT = _kind(
    peft.OFTConfig,
    {
        "oft": {"oft_block_size": 16},
        "oft-solve": {"use_cayley_neumann": False},
        "oft-terms": {"oft_block_size": 16, "num_cayley_neumann_terms": 3},
        "oft-number": {"r": 4, "oft_block_size": 0},
        "oft-share": {"block_share": True},
        "oft-constrained": {"coft": True, "eps": 1.8},
        "oft-embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    },
    oft_block_size=8,
    target_modules=LINEAR,
    families=NO_GPT2,
)
BOFT = _kind(
    peft.BOFTConfig,
    {
        "boft": {"boft_block_size": 8, "target_modules": LINEAR},
        "boft-number": {"boft_block_size": 0, "boft_block_num": 8},
        "boft-butterfly": {"boft_block_size": 4, "boft_n_butterfly_factor": 2},
    },
    target_modules=QV,
    families=NO_GPT2,
)
IA3 = _kind(
    peft.IA3Config,
    {
        "ia3": {},
        "ia3-targets": {
            "target_modules": LINEAR,
            "feedforward_modules": Names(["down_proj", "q_proj"], ["c_fc"]),
        },
        "ia3-save-head": {"modules_to_save": ["lm_head"]},
    },
)
LN_TUNING = _kind(
    peft.LNTuningConfig,
    {
        "ln-tuning": {},
        "ln-tuning-some": {"target_modules": Names(["norm"], ["ln_2", "ln_f"])},
    },
)
TRAINABLE_TOKENS = _kind(
    peft.TrainableTokensConfig,
    {"trainable-tokens": {}, "trainable-tokens-target": {"target_modules": EMBEDDING}},
    token_indices=TOKENS,
    prompt_tokens=tuple(TOKENS),
)
PROMPT_TUNING = _kind(
    peft.PromptTuningConfig,
    {"prompt-tuning": {"num_virtual_tokens": 5}, "prompt-tuning-long": {"num_virtual_tokens": 19}},
)
P_TUNING = _kind(
    peft.PromptEncoderConfig,
    {
        "p-tuning-mlp": {"num_virtual_tokens": 5},
        "p-tuning-lstm": {"num_virtual_tokens": 16, "encoder_reparameterization_type": "LSTM"},
    },
    encoder_hidden_size=24,
)
PREFIX_TUNING = _kind(
    peft.PrefixTuningConfig,
    {
        "prefix-tuning": {"num_virtual_tokens": 5},
        "prefix-tuning-long": {"num_virtual_tokens": 19},
        "prefix-tuning-projection": {
            "num_virtual_tokens": 16,
            "prefix_projection": True,
            "encoder_hidden_size": 24,
        },
    },
)
MULTITASK = _kind(
    peft.MultitaskPromptTuningConfig,
    {
        "multitask-task-0": {"num_virtual_tokens": 5, "options": {"task_id": 0}},
        "multitask-task-1": {"num_virtual_tokens": 19, "num_ranks": 3, "options": {"task_id": 1}},
    },
    num_tasks=2,
)
CPT = _kind(
    peft.CPTConfig,
    {
        "cpt": {
            "cpt_token_ids": CPT_TOKENS,
            "cpt_tokens_type_mask": [i % 4 + 1 for i in range(len(CPT_TOKENS))],
            "opt_projection_epsilon": 0.5,
        }
    },
)
ADAPTION_PROMPT = _kind(
    peft.AdaptionPromptConfig,
    {
        "adaption-prompt": {"adapter_len": 5, "adapter_layers": 2},
        "adaption-prompt-top": {"adapter_len": 19, "adapter_layers": 1},
    },
    families=frozenset({"llama", "gpt2"}),
)

VARIANTS: tuple[Variant, ...] = (
    *LORA,
    *ADALORA,
    *LOHA,
    *LOKR,
    *VERA,
    *VBLORA,
    *RANDLORA,
    *POLY,
    *MISS,
    *HRA,
    *FOURIERFT,
    *SHIRA,
    *C3A,
    *OFT,
    *BOFT,
    *IA3,
    *LN_TUNING,
    *TRAINABLE_TOKENS,
    *PROMPT_TUNING,
    *P_TUNING,
    *PREFIX_TUNING,
    *MULTITASK,
    *CPT,
    *ADAPTION_PROMPT,
)

REFUSED_VARIANTS: tuple[Variant, ...] = (
    *_kind(
        LoraConfig,
        {
            "layer-replication": {"layer_replication": [(0, 2), (1, 2)]},
            "pissa-random": {"init_lora_weights": "pissa_niter_4"},
            "arrow": {
                "arrow_config": peft.ArrowConfig(top_k=1),
                "build": _build_arrow,
                "write": _write_router,
            },
        },
        target_modules=["q_proj"],
        families=NO_GPT2,
        served=False,
    ),
    *_kind(
        peft.XLoraConfig,
        {
            "xlora": {
                "adapters": {},
                "hidden_size": lambda base: base.config.hidden_size,
                "xlora_depth": 2,
                "xlora_size": 8,
                "build": _build_xlora,
            }
        },
        families=NO_GPT2,
        served=False,
    ),
)
"""LoftQ is not here: PEFT makes it with scipy only, which nothing else needs."""
