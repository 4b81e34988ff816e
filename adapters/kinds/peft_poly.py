"""Polytropon and multi-head routing (arXiv:2202.13914, arXiv:2211.03831) as PEFT stores them.

    y += B A x / r,

where A and B are mixtures of the module's ``n_skills`` LoRAs, with weights that belong to a task:

    w = sigmoid(logits[task]), divided by its sum over the skills,
    A = sum_s w_s A_s,   B = sum_s w_s B_s,

for each of ``n_splits`` parts of input and output with weights of its own. Which task a request is
for is not in the file: ``deltamux.json`` beside it says it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base import Base
from ..checkpoint import Checkpoint
from ..errors import AdapterUnsupported, shown
from ..formats.config_fields import FieldRules, positive_int
from ..formats.linear_adapter import (
    HARMLESS,
    LinearAdapter,
    PeftKind,
    Tensors,
    bounded_rank,
    iter_each,
    low_rank,
    low_rank_shape,
    require_shape,
)
from ..formats.peft_tensors import required
from ..kind import KindPage, PrimitiveShape
from ..layout import LinearTarget
from ..primitives.primitive import Primitive

_A, _B, _LOGITS = "poly_lora_A", "poly_lora_B", "poly_router.module_logits"
_TASK = "task_id"
_EPSILON = 1e-12


@dataclass(frozen=True, slots=True)
class _Sizes:
    rank: int
    tasks: int
    skills: int
    splits: int


@dataclass(frozen=True, slots=True)
class _Module:
    """a (splits, skills, in / splits, r), b (splits, skills, r, out / splits), a task's logits."""

    path: str
    a: Tensor
    b: Tensor
    logits: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[3]

    @property
    def in_features(self) -> int:
        return self.a.shape[0] * self.a.shape[2]

    @property
    def out_features(self) -> int:
        return self.b.shape[0] * self.b.shape[3]

    @property
    def shapes(self) -> Iterator[PrimitiveShape]:
        yield low_rank_shape(self.path, self.rank, self.in_features, self.out_features)


def _read(checkpoint: Checkpoint) -> LinearAdapter[_Module]:
    config = checkpoint.config
    if config.get("poly_type", "poly") != "poly":
        raise AdapterUnsupported(
            f"the config field 'poly_type' is {shown(config['poly_type'])}, not 'poly'"
        )
    sizes = _Sizes(
        rank=bounded_rank("r", config.get("r", 8)),
        tasks=positive_int("n_tasks", config.get("n_tasks", 1)),
        skills=positive_int("n_skills", config.get("n_skills", 4)),
        splits=positive_int("n_splits", config.get("n_splits", 1)),
    )
    task = _task(checkpoint.options, sizes.tasks)
    tensors = Tensors.read(config, checkpoint.tensors, (_A, _B, _LOGITS))
    modules = tuple(_module(path, parts, sizes, task) for path, parts in tensors.modules.items())
    return LinearAdapter(modules, iter_each(_lower), tensors.saved)


def _task(options: Mapping[str, object], tasks: int) -> int:
    if _TASK not in options:
        if tasks > 1:
            raise AdapterUnsupported(
                f"the adapter holds {tasks} tasks, and nothing says which one is served: write "
                f'{{"{_TASK}": 0}} (up to {tasks - 1}) to deltamux.json beside it'
            )
        return 0
    task = options[_TASK]
    if not isinstance(task, int) or isinstance(task, bool) or not 0 <= task < tasks:
        raise AdapterUnsupported(
            f"the option {_TASK!r} of deltamux.json is {shown(task)}, and the adapter's tasks are "
            f"0 to {tasks - 1}"
        )
    return task


def _module(path: str, parts: Mapping[str, Tensor], sizes: _Sizes, task: int) -> _Module:
    a, b, logits = required(path, parts, _A, _B, _LOGITS)
    require_shape(path, _A, a, sizes.splits, sizes.skills, None, sizes.rank)
    require_shape(path, _B, b, sizes.splits, sizes.skills, sizes.rank, None)
    require_shape(path, _LOGITS, logits, sizes.tasks, sizes.splits * sizes.skills)
    return _Module(path, a, b, logits[task].view(sizes.splits, sizes.skills))


def _lower(base: Base, target: LinearTarget, module: _Module) -> Iterator[Primitive]:
    weights = module.logits.float().sigmoid()
    weights = weights / (weights.sum(dim=1, keepdim=True) + _EPSILON)
    a = torch.einsum("qs,qsdr->rqd", weights, module.a.float()).flatten(1)
    b = torch.einsum("qs,qsrd->rqd", weights, module.b.float()).flatten(1) / module.rank
    yield low_rank(base, target, a, b)


KIND = PeftKind(
    name="poly",
    page=KindPage(
        title="Poly: Polytropon and multi-head routing (arXiv:2202.13914, arXiv:2211.03831)",
        family="reparameterisation",
        files="poly_lora_A (n_splits, n_skills, in / n_splits, r), poly_lora_B (n_splits, "
        "n_skills, r, out / n_splits) and poly_router.module_logits (n_tasks, n_splits n_skills) "
        "of each module; fields r, n_tasks, n_skills, n_splits",
        equation="y += B A x / r with A = sum_s w_s A_s and B = sum_s w_s B_s, w = "
        "sigmoid(module_logits[task_id]) divided by its sum over the skills, for each split",
        primitives=("Affine", "Dense"),
        memory="r (in + out) a module, in out where that is less: the skills are mixed when the "
        "adapter is loaded",
        limits="One task an adapter; load the folder again under another name for another task. "
        "Linear modules only, as in PEFT: not GPT-2's Conv1D.",
        options={"task_id": "the task, from 0; needed where n_tasks is more than 1"},
    ),
    rules=FieldRules(
        implemented=frozenset(
            {"r", "poly_type", "n_tasks", "n_skills", "n_splits", "modules_to_save"}
        ),
        harmless=HARMLESS,
        refused={},
    ),
    read=_read,
)
