"""Adapters of every kind with one thing wrong: refused, or what is served is not touched by it.

Every field of every configuration gets hostile values, and every kind of tensor another shape, name
or type. What happens must be an AdapterError; where it is none, the change must be one that cannot
matter, or that means something to the library. Draws are seeded by the adapter's name.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from deltamux.adapters.checkpoint import Checkpoint, open_checkpoint
from deltamux.adapters.errors import (
    AdapterCorrupt,
    AdapterError,
    AdapterTooLarge,
    AdapterUnsupported,
)
from deltamux.adapters.files import HEAD_FILES, WEIGHT_FILES
from deltamux.adapters.folder import ConfigFile, open_config
from deltamux.adapters.formats import adapterhub_bottleneck, adapterhub_lora
from deltamux.adapters.inspect import describe
from deltamux.adapters.kind import Lowered
from deltamux.adapters.kinds import adapterhub_mtl_lora, adapterhub_prefix_tuning, adapterhub_reft
from deltamux.adapters.lower import all_kinds, find_kind, lower
from deltamux.server.model.base import ServedBase, load_base

from ..adapterhub_golden import GOLDEN
from ..adapterhub_golden import REFUSED as REFUSED_GOLDENS
from ..peft_zoo import REFUSED_VARIANTS, VARIANTS, PeftOracle
from ..plain_zoo import PLAIN_VARIANTS, said_variant
from .fingerprint import fingerprint, stored_tensors

ROOM = 1 << 30
VALUES: tuple[object, ...] = (
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    1.5,
    -0.5,
    10**9,
    10**30,
    1e308,
    1e-300,
    "NaN",
    "x",
    "",
    "q" * 100_000,
    [],
    [0],
    [-1],
    [True],
    [10**30],
    ["x"],
    [0] * 10_000,
    [[[[1]]]],
    {},
    {"x": -1},
    {"x": [1]},
    {".*": 1},
)
NONSENSE = [["mystery"]]
"""What no field of any configuration can be."""

MEANT = frozenset(
    {
        # PEFT: numbers and switches that the library computes with
        "alpha",
        "alpha_pattern",
        "alora_invocation_tokens",
        "apply_GS",
        "coft",
        "eps",
        "init_lora_weights",
        "lora_alpha",
        "mini_r",
        "num_cayley_neumann_terms",
        "projection_prng_key",
        "random_loc_seed",
        "randlora_alpha",
        "rank_pattern",
        "scaling",
        "seed",
        "sparse",
        "topk",
        "use_cayley_neumann",
        "use_rslora",
        "very_sparse",
        # AdapterHub
        "attn_matrices",
        "is_parallel",
        "leave_out",
        "non_linearity",
        "original_ln_after",
        "original_ln_before",
        "prefix_positions",
        "residual_before_ln",
        "subtract_projection",
        "suffix_positions",
        "weights_sharpness",
        "version",
    }
)
"""Fields with sane values among VALUES that mean something else than the adapter's own."""

PEFT = (
    *(f"llama/{name}" for name in ("lora", "lora-patterns", "lora-save-both", "lora-tokens-both")),
    *(f"llama/{name}" for name in ("lora-pissa", "lora-bdlora", "lora-kasa", "dora", "alora")),
    *("gpt2/lora", "gpt2/lora-bias-all", "gpt2/lora-parameters", "qwen2/dora-bias-only"),
    *(f"llama/{name}" for name in ("adalora-pruned", "loha", "lokr", "lokr-full", "vera")),
    *(f"llama/{name}" for name in ("vera-regenerated", "vblora", "vblora-topk", "randlora")),
    *(f"llama/{name}" for name in ("randlora-sparse", "poly-task-1", "miss", "miss-mini")),
    *(f"llama/{name}" for name in ("miss-bat", "hra-gram-schmidt", "fourierft-pattern", "shira")),
    *(f"llama/{name}" for name in ("c3a-pattern", "oft-constrained", "oft-embedding")),
    *(f"llama/{name}" for name in ("boft-butterfly", "boft-number", "ia3-targets", "ln-tuning")),
    *("gpt2/ln-tuning", "gpt2/ia3", "llama/trainable-tokens", "llama/prompt-tuning"),
    *(f"llama/{name}" for name in ("p-tuning-mlp", "prefix-tuning", "multitask-task-1", "cpt")),
    *("llama/adaption-prompt", "gpt2/adaption-prompt"),
)
HUB = (
    *(f"llama/{name}" for name in ("seq_bn", "par_bn_phm", "scaled_par_bn", "compacter")),
    *(f"llama/{name}" for name in ("compacter_own_factored_rule", "seq_bn_per_layer_leave_out")),
    *(f"llama/{name}" for name in ("seq_bn_inv", "seq_bn_trained_head", "adapter_plus", "dora")),
    *(f"llama/{name}" for name in ("lora", "mtl_lora", "vera_kv", "dvora", "ia3_alpha", "mam")),
    *(f"llama/{name}" for name in ("prefix_flat_leave_out", "prefix_mlp", "loreft_rank_4")),
    *(f"llama/{name}" for name in ("noreft_suffix", "union_two_bn", "union_reft_lora")),
    *("gpt2/lora_kv", "gpt2/ia3", "gpt2/double_seq_bn", "gpt2/mam"),
)
PLAIN = ("said", *(variant.name for variant in PLAIN_VARIANTS))
SUBJECTS = (
    *(f"peft/{name}" for name in PEFT),
    *(f"adapterhub/{name}" for name in HUB),
    *(f"plain/llama/{name}" for name in PLAIN),
    "plain/gpt2/tensors",
    "plain/gpt2/bitfit",
)


@dataclass(frozen=True)
class Subject:
    """A good adapter, read from its files, and what it lowers to on its base."""

    name: str
    base: ServedBase
    config: ConfigFile
    checkpoint: Checkpoint
    lowered: Lowered

    @classmethod
    def of(cls, name: str, base: ServedBase, folder: Path) -> "Subject":
        config = open_config(folder)
        checkpoint = open_checkpoint(config)
        lowered = find_kind(config).parse(checkpoint).lower(base)
        return cls(name, base, config, checkpoint, lowered)

    def lower(self, fields: Mapping[str, Any], options: Mapping[str, Any]) -> Lowered:
        """It with another configuration."""
        config = replace(self.config, fields=fields, options=options)
        checkpoint = replace(self.checkpoint, config=fields, options=options)
        return find_kind(config).parse(checkpoint).lower(self.base)

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> Path:
        """It with other tensors, as files."""
        folder.mkdir(exist_ok=True)
        for name, raw in self.config.read:
            (folder / name).write_bytes(raw)
        for name in HEAD_FILES:
            if (self.config.folder / name).exists():
                shutil.copy(self.config.folder / name, folder / name)
        weights = WEIGHT_FILES[self.config.library][0]
        dense = {
            name: each.clone(memory_format=torch.contiguous_format)
            for name, each in tensors.items()
        }
        save_file(dense, folder / weights)
        return folder

    @property
    def fingerprint(self) -> object:
        return fingerprint(self.lowered)

    @property
    def justified(self) -> int:
        """Numbers in the file and in the base."""
        layout = self.base.layout
        inside = sum(t.in_features * t.out_features for t in layout.iter_targets())
        rows = sum(site.num_embeddings * site.size for site in layout.embeddings)
        return inside + rows + sum(each.numel() for each in self.checkpoint.tensors.values())


@pytest.fixture(scope="module")
def subject(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Subject]:
    root = tmp_path_factory.mktemp("subjects")

    @cache
    def oracle(family: str) -> PeftOracle:
        return PeftOracle(tiny_model(family))

    @cache
    def base(family: str) -> ServedBase:
        return load_base(tiny_model(family), torch.float32)

    def folder(library: str, family: str, name: str) -> Path:
        if library == "adapterhub":
            return GOLDEN / "adapterhub" / family / name
        made = root / library / family / name
        if library == "peft":
            variant = next(each for each in VARIANTS if each.name == name)
            return oracle(family).save(variant, made, 1)
        model = oracle(family).model
        plain = next(each for each in (*PLAIN_VARIANTS, said_variant(model)) if each.name == name)
        return plain.save(model, made, 1)

    @cache
    def get(name: str) -> Subject:
        library, family, short = name.split("/")
        return Subject.of(name, base(family), folder(library, family, short))

    return get


def test_the_subjects_are_of_every_kind_that_is_served(subject: Callable[[str], Subject]) -> None:
    kinds = {(kind.library, kind.name) for kind in all_kinds()}
    found = [find_kind(subject(name).config) for name in SUBJECTS]
    left = kinds - {(kind.library, kind.name) for kind in found}
    # Bone has lost its class, and AdapterHub's prompt tuning is refused.
    assert left == {("peft", "bone"), ("adapterhub", "prompt_tuning")}


@pytest.mark.parametrize("name", SUBJECTS)
def test_hostile_fields_are_refused_or_mean_something(
    name: str, subject: Callable[[str], Subject]
) -> None:
    good, choose = subject(name), random.Random(name)
    for path in field_paths(good.config.fields):
        for value in choose.sample(VALUES, 2):
            fields = with_field(good.config.fields, path, value)
            check(good, path, value, lambda: good.lower(fields, good.config.options))  # noqa: B023
    for option in ("task_id", "subtract_projection", "sparkle"):
        for value in choose.sample(VALUES, 4):
            options = {**good.config.options, option: value}
            check(good, (option,), value, lambda: good.lower(good.config.fields, options))  # noqa: B023


@pytest.mark.parametrize("name", SUBJECTS)
def test_nonsense_in_a_field_that_counts_is_refused(
    name: str, subject: Callable[[str], Subject]
) -> None:
    good = subject(name)
    counting = list(counting_fields(good))
    assert counting or "modules_to_save" not in good.config.fields
    for path in counting:
        fields = with_field(good.config.fields, path, NONSENSE)
        assert refuses(lambda: good.lower(fields, good.config.options)), path  # noqa: B023


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_field_that_is_missing_has_the_librarys_default(
    name: str, subject: Callable[[str], Subject]
) -> None:
    """What computes another answer by its absence is a number or switch of the library's."""
    good = subject(name)
    for path in field_paths(good.config.fields):
        fields = with_field(good.config.fields, path, None, drop=True)
        if good.config.library == "adapterhub" and path == ("config",):
            continue  # nothing would tell whose it is
        defaults = MEANT | {"r", "use_dora", "mh_adapter", "bias", "modules_to_save"}
        check(good, path, None, lambda: good.lower(fields, good.config.options), defaults)  # noqa: B023


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_tensor_of_another_shape_name_or_type_is_refused(
    name: str, subject: Callable[[str], Subject], tmp_path: Path
) -> None:
    good, choose = subject(name), random.Random(name)
    tensors = good.checkpoint.tensors
    for key in some_tensors(good):
        for what, changed in choose.sample(list(changes(key, tensors)), 5):
            folder = good.write(tmp_path / "changed", changed)
            if not refuses(lambda: lower(folder, good.base, ROOM)):  # noqa: B023
                assert cannot_matter(good, key, what), (key, what)
                found = lower(folder, good.base, ROOM)
                assert fingerprint(Lowered(found.parts, found.prefix)) == good.fingerprint


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_number_that_is_none_and_a_wider_type(
    name: str, subject: Callable[[str], Subject], tmp_path: Path
) -> None:
    good = subject(name)
    tensors = dict(good.checkpoint.tensors)
    key = next(key for key in sorted(tensors) if tensors[key].is_floating_point())
    poisoned = tensors[key].clone()
    poisoned.view(-1)[-1] = float("nan")
    with pytest.raises(AdapterCorrupt, match="NaN"):
        describe(good.write(tmp_path / "nan", {**tensors, key: poisoned}))
    with pytest.raises(AdapterCorrupt, match="as float32"):
        describe(good.write(tmp_path / "wide", {**tensors, key: poisoned.double().fill_(1e300)}))
    wider = {n: t.double() if t.dtype is torch.float32 else t for n, t in tensors.items()}
    found = lower(good.write(tmp_path / "double", wider), good.base, ROOM)
    assert fingerprint(Lowered(found.parts, found.prefix)) == good.fingerprint


@pytest.mark.parametrize(
    "name", ["peft/llama/lora", "peft/llama/oft-embedding", "plain/gpt2/bitfit"]
)
@pytest.mark.parametrize("shape", [[1] * 63, [1] * 70, [1] * 5000, [0, 1 << 40], [0, 1 << 62, 8]])
def test_a_shape_that_only_a_header_can_have(
    name: str, shape: list[int], subject: Callable[[str], Subject], tmp_path: Path
) -> None:
    good = subject(name)
    key, tensor = next(iter(sorted(good.checkpoint.tensors.items())))
    count = 0 if 0 in shape else 1
    tensors = {**good.checkpoint.tensors, key: tensor.reshape(-1)[:count]}
    folder = good.write(tmp_path / "declared", tensors)
    declare(folder / WEIGHT_FILES[good.config.library][0], key, shape)
    with pytest.raises(AdapterError):
        lower(folder, good.base, ROOM)


EXPANDING = ("peft/llama/randlora-sparse", "peft/llama/miss-bat")


@pytest.mark.parametrize("name", [*EXPANDING, "plain/llama/said"])
def test_what_expands_beyond_its_room_is_refused_before_it_does(
    name: str, subject: Callable[[str], Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = subject(name)

    def touched(*_: object) -> None:
        raise AssertionError("it was lowered")

    for reader in ("linear", "embedding"):
        monkeypatch.setattr(good.base, reader, touched)
    tensors = good.checkpoint.tensors.values()
    room = sum(each.numel() for each in tensors) * good.base.dtype.itemsize
    with pytest.raises(AdapterTooLarge, match=r"would take \d+ numbers or more on this base"):
        lower(good.config.folder, good.base, room)


@pytest.mark.parametrize(("name", "rank"), [("vera-regenerated", 400), ("randlora-sparse", 4000)])
def test_a_seed_stands_for_no_more_than_the_base_justifies(
    name: str, rank: int, subject: Callable[[str], Subject]
) -> None:
    good = subject(f"peft/llama/{name}")
    tensors = {}
    for key, tensor in good.checkpoint.tensors.items():
        if key.endswith("lambda_d"):
            tensors[key] = torch.ones(rank)
        elif key.endswith(("randlora_lambda", "randlora_gamma")):
            tensors[key] = torch.ones((rank, 1) if "lambda" in key else (1, tensor.shape[1]))
        else:
            tensors[key] = tensor
    fields = {**good.config.fields, "r": rank}
    changed = replace(good.checkpoint, config=fields, tensors=tensors)
    parsed = find_kind(good.config).parse(changed)
    with pytest.raises(AdapterUnsupported, match=f"random matrices of rank {rank}"):
        parsed.lower(good.base)


NOT_SERVED = [each.name for each in (*REFUSED_VARIANTS, *REFUSED_GOLDENS)]


@pytest.mark.parametrize("name", NOT_SERVED)
def test_what_is_refused_by_name_is_so_without_a_base(
    name: str, subject: Callable[[str], Subject], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    good = subject("peft/llama/lora")
    variant = next((each for each in REFUSED_VARIANTS if each.name == name), None)
    if variant is None:
        folder = GOLDEN / "adapterhub_refused" / name
    else:
        folder = PeftOracle(tiny_model("llama")).save(variant, tmp_path / name, 1)
    with pytest.raises(AdapterUnsupported if name != "stack" else AdapterCorrupt) as told:
        describe(folder)
    with pytest.raises(type(told.value)) as lowered:
        lower(folder, good.base, ROOM)
    assert str(lowered.value) == str(told.value)
    assert any(sign in str(told.value) for sign in (": ", "?")), "what to do"


Path_ = tuple[Any, ...]


def field_paths(fields: Mapping[str, Any]) -> Iterator[Path_]:
    """Every field, those of AdapterHub's configurations and of PEFT's nested ones too."""
    for name, value in fields.items():
        yield (name,)
        if isinstance(value, dict):
            yield from ((name, inner) for inner in value)
        if name == "config":
            for index, each in enumerate(value.get("configs", ())):
                yield from ((name, "configs", index, inner) for inner in each)


def with_field(
    fields: Mapping[str, Any], path: Path_, value: object, *, drop: bool = False
) -> dict[str, Any]:
    changed: dict[str, Any] = json.loads(json.dumps(fields))
    inside: Any = changed
    for step in path[:-1]:
        inside = inside[step]
    if drop:
        inside.pop(path[-1])
    else:
        inside[path[-1]] = value
    return changed


def refuses(make: Callable[[], object]) -> bool:
    try:
        make()
    except AdapterError:
        return True
    return False


def check(
    good: Subject,
    path: Path_,
    value: object,
    make: Callable[[], Lowered],
    meant: frozenset[str] = MEANT,
) -> None:
    """An AdapterError, or the same, or something that the field may mean, of sane size."""
    if refuses(make):
        return
    lowered = make()
    tensors = stored_tensors(lowered)
    assert sum(each.numel() for each in tensors) <= 3 * good.justified, (path, value)
    assert all(bool(each.isfinite().all()) for each in tensors), (path, value)
    if not meant.intersection(map(str, path)) and path != ("task_id",):
        assert fingerprint(lowered) == good.fingerprint, (path, value)


RULES = {
    "lora": adapterhub_lora.RULES,
    "mtl_lora": adapterhub_mtl_lora.MTL_RULES,
    "prefix_tuning": adapterhub_prefix_tuning.RULES,
    "reft": adapterhub_reft.RULES,
    None: adapterhub_bottleneck.RULES,
}


def counting_fields(good: Subject) -> Iterator[Path_]:
    """The implemented fields of a configuration that this adapter has a use for."""
    fields = good.config.fields
    if good.config.library != "adapterhub":
        rules = getattr(find_kind(good.config), "rules", None)
        implemented = {"mode", "seed", "tensors"} if rules is None else rules.implemented
        yield from ((name,) for name in fields if name in implemented)
        return
    yield from ((name,) for name in ("hidden_size", "model_type", "name", "version"))
    inner = fields["config"]
    many = enumerate(inner.get("configs", ()))
    for path, config in chain(
        [(("config",), inner)] if "configs" not in inner else [],
        ((("config", "configs", index), each) for index, each in many),
    ):
        used = RULES[config.get("architecture")].implemented - unused(config)
        yield from ((*path, name) for name in config if name in used)


def unused(config: Mapping[str, Any]) -> set[str]:
    """Fields that this configuration of AdapterHub's switches off."""
    names = {"vera_d", "vera_b"}  # the library looks at their type alone
    if not config.get("phm_layer"):
        names |= {name for name in config if "phm" in name and name != "phm_layer"}
    if config.get("factorized_phm_W") is False:
        names.add("phm_rank")
    if not config.get("inv_adapter"):
        names.add("inv_adapter_reduction_factor")
    if config.get("is_parallel"):
        names.add("original_ln_before")
    if config.get("flat"):
        names |= {"bottleneck_size", "non_linearity"}
    return names


def some_tensors(good: Subject) -> list[str]:
    """One of each name, of a module's or of all."""
    names: dict[str, str] = {}
    for key in sorted(good.checkpoint.tensors):
        parts = key.split(".")
        kind = ".".join(parts[-2:]) if parts[-1] in ("weight", "bias") else parts[-1]
        names.setdefault(kind, key)
    return list(names.values())[:8]


def changes(key: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tensors with one of another shape, type or name."""
    tensor = tensors[key]
    others: dict[str, Tensor] = {
        "empty": tensor.new_zeros(0),
        "scalar": tensor.reshape(-1)[0],
        "deep": tensor.reshape((1,) * 40 + tuple(tensor.shape)),
        "unsqueezed": tensor[None],
        "behind": tensor[..., None],
        "integers": tensor.to(torch.int64),
        "truth": tensor.to(torch.bool),
        "complex": tensor.to(torch.complex64),
        "float8": tensor.float().to(torch.float8_e5m2),
    }
    if tensor.dim() > 1:
        others["flat"] = tensor.reshape(-1)
        others["wider"] = torch.cat([tensor, tensor[..., :1]], dim=-1)
        others["refolded"] = tensor.reshape(1, -1)
    if tensor.dim() == 2:
        others["transposed"] = tensor.t()
    if tensor.dim() and key != "theta_d":  # SAID's may have any length
        others["longer"] = torch.cat([tensor, tensor[:1]])
        others["headless"] = tensor[:0]
    for what, other in others.items():
        if other.shape != tensor.shape or other.dtype != tensor.dtype:
            yield what, {**tensors, key: other}
    for what, name in (
        ("renamed", f"{key}x"),
        ("elsewhere", key.replace(".0.", ".9.")),
        ("shortened", key.partition(".")[2] or f"y{key}"),
        ("endless", f"{key.partition('.')[0]}.{'x.' * 3000}weight"),
    ):
        if name != key:
            yield what, {name if each == key else each: t for each, t in tensors.items()}


def cannot_matter(good: Subject, key: str, what: str) -> bool:
    """Changes that leave an adapter what it was."""
    library = good.config.library
    if library == "adapterhub" and what == "shortened":
        return True  # saved from a model without a head
    if what == "integers" and key.endswith("_indices"):
        return True
    copies = (".prefix_tunings.", "randlora_A", "randlora_B")
    is_copy = any(part in key for part in copies) and what in ("renamed", "elsewhere")
    return is_copy and library == "adapterhub"


def declare(path: Path, key: str, shape: list[int]) -> None:
    """Write another shape into the header of a safetensors file."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header[key]["shape"] = shape
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
