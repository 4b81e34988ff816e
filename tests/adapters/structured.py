"""Random adapters of PEFT's structured kinds, saved and run by PEFT, and lowered by ours."""

import copy
import importlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.boft import layer as boft_layer
from torch import Tensor
from transformers import AutoModelForCausalLM

from deltamux.adapters.base import Base
from deltamux.adapters.checkpoint import Checkpoint, open_checkpoint
from deltamux.adapters.folder import open_config
from deltamux.adapters.kind import AdapterKind, Lowered, ParsedAdapter
from deltamux.server.model.base import load_base

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
GPT2 = ["c_attn", "c_proj", "c_fc", "lm_head"]


@dataclass(frozen=True)
class Case:
    config: Callable[..., PeftConfig]
    fields: dict[str, Any] = field(default_factory=dict)
    family: str = "llama"
    options: dict[str, Any] = field(default_factory=dict)
    targets: Any = None

    def make(self) -> PeftConfig:
        targets = self.targets or (GPT2 if self.family == "gpt2" else LINEAR)
        values = {"target_modules": copy.deepcopy(targets), **copy.deepcopy(self.fields)}
        return self.config(task_type="CAUSAL_LM", **values)


LOHA, LOKR, VERA = peft.LoHaConfig, peft.LoKrConfig, peft.VeraConfig
VBLORA, RANDLORA, FOURIER = peft.VBLoRAConfig, peft.RandLoraConfig, peft.FourierFTConfig
SHIRA, MISS, C3A, HRA = peft.ShiraConfig, peft.MissConfig, peft.C3AConfig, peft.HRAConfig
OFT, BOFT, POLY = peft.OFTConfig, peft.BOFTConfig, peft.PolyConfig
VB = {"num_vectors": 20, "vector_length": 16, "r": 3}
TASKS = {"r": 3, "n_tasks": 3, "n_skills": 2}

CASES = {
    "loha": Case(LOHA, {"r": 3, "alpha": 5}),
    "loha, too wide": Case(LOHA, {"r": 9, "alpha": 4}),
    "loha of rank 1": Case(LOHA, {"r": 1, "alpha": 2}, "qwen3"),
    "loha, patterns": Case(
        LOHA,
        {
            "r": 4,
            "rank_pattern": {"q_proj": 2, r"1\.mlp\..*": 5},
            "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 3},
        },
    ),
    "loha, norms saved": Case(LOHA, {"r": 2, "modules_to_save": ["norm", "k_norm"]}, "qwen3"),
    "loha, head": Case(LOHA, {"r": 2}, targets=["lm_head", "q_proj"]),
    "loha, saved linear": Case(
        LOHA, {"r": 2, "modules_to_save": ["k_proj"]}, "qwen2", targets=["q_proj"]
    ),
    "lokr": Case(LOKR, {"r": 2, "alpha": 5}),
    "lokr, both factored": Case(LOKR, {"r": 2, "decompose_both": True}, "qwen3"),
    "lokr, whole": Case(LOKR, {"r": 64}),
    "lokr, product is smaller whole": Case(LOKR, {"r": 3, "decompose_factor": 16}),
    "lokr, odd factor": Case(LOKR, {"r": 3, "decompose_factor": 5}),
    "lokr, patterns": Case(
        LOKR, {"r": 2, "rank_pattern": {"v_proj": 4}, "alpha_pattern": {"o_proj": 0.5}}
    ),
    "vera": Case(VERA, {"r": 7}),
    "vera, qwen3": Case(VERA, {"r": 100}, "qwen3"),
    "vera, drawn": Case(VERA, {"r": 5, "save_projection": False, "projection_prng_key": 9}),
    "vera, drawn for two": Case(
        VERA, {"r": 5, "save_projection": False}, targets=["k_proj", "down_proj"]
    ),
    "vera, gpt2": Case(VERA, {"r": 5, "fan_in_fan_out": True}, "gpt2"),
    "vera, gpt2, drawn": Case(
        VERA, {"r": 3, "fan_in_fan_out": True, "save_projection": False}, "gpt2", targets=GPT2[:3]
    ),
    "vera, biases": Case(VERA, {"r": 5, "bias": "all", "fan_in_fan_out": True}, "gpt2"),
    "vera, own biases": Case(VERA, {"r": 5, "bias": "vera_only"}, "qwen2"),
    "vblora": Case(VBLORA, VB),
    "vblora, topk": Case(VBLORA, {**VB, "topk": 4, "save_only_topk_weights": True}, "qwen3"),
    "vblora, one vector": Case(VBLORA, {**VB, "topk": 1, "save_only_topk_weights": True}),
    "vblora, many vectors": Case(
        VBLORA, {**VB, "num_vectors": 300, "save_only_topk_weights": True}, "qwen2"
    ),
    "vblora, gpt2": Case(VBLORA, {**VB, "fan_in_fan_out": True}, "gpt2", targets=GPT2[:3]),
    "randlora": Case(RANDLORA, {"r": 6, "randlora_alpha": 10}),
    "randlora, rank over the width": Case(RANDLORA, {"r": 80, "randlora_alpha": 10}, "qwen3"),
    "randlora, drawn": Case(
        RANDLORA,
        {"r": 5, "save_projection": False, "projection_prng_key": 9, "randlora_alpha": 6},
    ),
    "randlora, sparse": Case(RANDLORA, {"r": 5, "sparse": True, "save_projection": False}),
    "randlora, very sparse": Case(
        RANDLORA, {"r": 5, "very_sparse": True, "sparse": True, "save_projection": False}
    ),
    "randlora, gpt2": Case(
        RANDLORA,
        {"r": 6, "randlora_alpha": 3, "fan_in_fan_out": True, "save_projection": False},
        "gpt2",
        targets=GPT2[:3],
    ),
    "fourierft": Case(FOURIER, {"n_frequency": 50}),
    "fourierft, pattern": Case(
        FOURIER,
        {"n_frequency": 40, "n_frequency_pattern": {"q_proj": 7}, "random_loc_seed": -3},
        "qwen3",
    ),
    "fourierft, every frequency": Case(
        FOURIER, {"n_frequency": 64 * 32, "scaling": 20.0}, targets=["k_proj", "v_proj"]
    ),
    "fourierft, gpt2": Case(
        FOURIER, {"n_frequency": 60, "fan_in_fan_out": True}, "gpt2", targets=GPT2[:3]
    ),
    "shira": Case(SHIRA, {"r": 2}),
    "shira, seed": Case(SHIRA, {"r": 5, "random_seed": 9}, "qwen3"),
    "miss": Case(MISS, {"r": 8}),
    "miss, uneven": Case(MISS, {"r": 7}, "qwen3"),
    "miss, random": Case(MISS, {"r": 5, "init_weights": False}),
    "miss, mini": Case(MISS, {"r": 8, "mini_r": 4, "init_weights": "mini"}),
    "miss, mini, uneven": Case(MISS, {"r": 9, "mini_r": 8, "init_weights": "mini"}, "qwen3"),
    "miss, bat": Case(MISS, {"r": 8, "init_weights": "bat"}),
    "miss, bat, biases": Case(MISS, {"r": 16, "init_weights": "bat", "bias": "all"}, "qwen2"),
    "c3a": Case(C3A, {"block_size": 16}),
    "c3a, pattern": Case(
        C3A, {"block_size": 8, "block_size_pattern": {"q_proj": 32, r"1\.mlp.*": 1}}, "qwen3"
    ),
    "hra": Case(HRA, {"r": 4}),
    "hra, odd": Case(HRA, {"r": 5, "init_weights": False}, "qwen3"),
    "hra, rank over the width": Case(HRA, {"r": 70}, targets=["q_proj"]),
    "hra, Gram-Schmidt": Case(HRA, {"r": 6, "apply_GS": True}),
    "hra, biases": Case(HRA, {"r": 4, "bias": "hra_only"}, "qwen2"),
    "oft": Case(OFT, {"oft_block_size": 16}),
    "oft, adjusted": Case(OFT, {"oft_block_size": 24}, "qwen3"),
    "oft, blocks": Case(OFT, {"r": 4, "oft_block_size": 0}),
    "oft, blocks, adjusted": Case(OFT, {"r": 5, "oft_block_size": 0}),
    "oft, whole": Case(OFT, {"oft_block_size": 4000}, targets=["k_proj"]),
    "oft, solved": Case(OFT, {"oft_block_size": 8, "use_cayley_neumann": False}),
    **{
        f"oft, {terms} terms": Case(OFT, {"oft_block_size": 8, "num_cayley_neumann_terms": terms})
        for terms in (2, 3, 4, 7)
    },
    "oft, shared": Case(OFT, {"oft_block_size": 8, "block_share": True}, "qwen2"),
    "oft, constrained": Case(OFT, {"oft_block_size": 8, "coft": True, "eps": 1.2}),
    "oft, constrained, shared": Case(
        OFT, {"oft_block_size": 8, "coft": True, "eps": 0.3, "block_share": True}
    ),
    "oft, hardly constrained": Case(OFT, {"oft_block_size": 8, "coft": True, "eps": 50.0}),
    "oft, embedding": Case(OFT, {"oft_block_size": 8}, targets=["embed_tokens", "q_proj"]),
    "oft, embedding alone": Case(OFT, {"oft_block_size": 16}, targets=["embed_tokens"]),
    "oft, biases": Case(OFT, {"oft_block_size": 8, "bias": "oft_only"}, "qwen2"),
    "boft": Case(BOFT, {"boft_block_size": 8}),
    "boft, biased base": Case(BOFT, {"boft_block_size": 4}, "qwen2"),
    "boft, biases": Case(BOFT, {"boft_block_size": 4, "bias": "boft_only"}, "qwen2"),
    "boft, number": Case(BOFT, {"boft_block_size": 0, "boft_block_num": 16}, "qwen3"),
    "boft, 2 factors": Case(BOFT, {"boft_block_size": 4, "boft_n_butterfly_factor": 2}, "qwen3"),
    "boft, 3 factors": Case(BOFT, {"boft_block_size": 8, "boft_n_butterfly_factor": 3}, "qwen2"),
    "boft, 5 factors": Case(
        BOFT, {"boft_block_size": 0, "boft_block_num": 16, "boft_n_butterfly_factor": 5}
    ),
    "poly, one task": Case(POLY, {"r": 3}),
    **{f"poly, task {n}": Case(POLY, TASKS, "qwen3", {"task_id": n}) for n in range(3)},
    "poly, rank over the width": Case(POLY, {"r": 70}, targets=["o_proj"]),
    "vblora, rank over the width": Case(VBLORA, {**VB, "r": 70}, targets=["k_proj"]),
    "poly, splits": Case(POLY, {**TASKS, "n_splits": 4, "n_tasks": 1}),
}


class BlockDiagonal:
    """What BOFT's CUDA extension computes; without it PEFT drops the butterfly factors."""

    def forward(self, blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]


@contextmanager
def library() -> Iterator[None]:
    """PEFT as on a machine with BOFT's extension, without what it says of adapters that work."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers` to `True`")
        warnings.filterwarnings("ignore", message="Specified to not (save|load) vera_A")
        warnings.filterwarnings("ignore", message="Specified to not save basis_A")
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly")
        warnings.filterwarnings("ignore", message="Invalid `(r|oft_block_size)`")
        warnings.filterwarnings("ignore", message="The symmetric initialization can NOT")
        with mock.patch.object(boft_layer, "_FBD_CUDA", BlockDiagonal()):
            yield


def save(case: Case, base: Path, folder: Path) -> PeftModel:
    """Save a random adapter, and give back what PEFT makes of the saved one."""
    with library(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        made = get_peft_model(copy.deepcopy(model), case.make())
        for parameter in made.parameters():
            if parameter.requires_grad:
                usual = max(float(parameter.detach().square().mean().sqrt()), 0.2)
                parameter.data += torch.randn_like(parameter) * usual
        made.save_pretrained(folder)
    if case.options:
        (folder / "deltamux.json").write_text(json.dumps(case.options))
    return reload(base, folder)


def reload(base: Path, folder: Path, dtype: torch.dtype = torch.float32) -> PeftModel:
    """What PEFT makes of the saved adapter on a base in this dtype."""
    with library():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        return PeftModel.from_pretrained(model, folder).eval()


def kind_of(folder: Path) -> AdapterKind:
    """The kind for the folder's ``peft_type``."""
    name = str(open_config(folder).fields["peft_type"]).lower()
    kind: AdapterKind = importlib.import_module(f"deltamux.adapters.kinds.peft_{name}").KIND
    return kind


def parse(folder: Path) -> ParsedAdapter:
    """What the kind reads from the folder."""
    config, kind = open_config(folder), kind_of(folder)
    assert kind.matches(config.fields)
    return kind.parse(open_checkpoint(config))


class Saved:
    """A checkpoint of PEFT's, its kind, and the base it was made for."""

    def __init__(self, kind: AdapterKind, checkpoint: Checkpoint, base: Base) -> None:
        self.kind, self.checkpoint, self.base = kind, checkpoint, base

    def lower(
        self,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        options: Mapping[str, object] | None = None,
        base: Base | None = None,
        **fields: object,
    ) -> Lowered:
        """Lower it with other tensors, options or fields of the configuration."""
        changed = replace(
            self.checkpoint,
            config={**self.checkpoint.config, **fields},
            tensors=self.checkpoint.tensors if tensors is None else tensors,
            options=self.checkpoint.options if options is None else options,
        )
        return self.kind.parse(changed).lower(base or self.base)

    def with_tensor(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        return {**self.checkpoint.tensors, name: tensor}

    def find(self, ending: str) -> tuple[str, Tensor]:
        """The first tensor whose name ends so."""
        return next(item for item in self.checkpoint.tensors.items() if item[0].endswith(ending))

    def renamed(self, old: str, new: str) -> dict[str, Tensor]:
        return {name.replace(old, new): t for name, t in self.checkpoint.tensors.items()}

    @classmethod
    def of(cls, name: str, base: Path, folder: Path) -> "Saved":
        """The case of this name, on three modules of each layer."""
        save(replace(CASES[name], targets=["q_proj", "up_proj", "down_proj"]), base, folder)
        checkpoint = open_checkpoint(open_config(folder))
        return cls(kind_of(folder), checkpoint, load_base(base, torch.float32))


def same(one: Lowered, other: Lowered) -> bool:
    """Whether both hold equal tensors."""
    pairs = zip(one.parts[0].primitives, other.parts[0].primitives, strict=True)
    return all(
        torch.equal(a, b)
        for first, second in pairs
        for a, b in zip(first.tensors, second.tensors, strict=True)
    )
