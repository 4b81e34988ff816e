"""Structured kinds of PEFT compute what PEFT computes, module by module."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import nn

from deltamux.adapters.primitives.linear import Affine, InputTransform, Kronecker
from deltamux.server.model.base import load_base

from .applied import Applied, check_order
from .structured import CASES, POLY, Case, kind_of, library, parse, reload, save

TOLERANCE = 2e-5
BFLOAT16_TOLERANCE = 2.0**-6
"""Of the largest output: a weight, a factor and an output are each rounded to 8 bits."""

MakeModel = Callable[..., Path]


def lowered(folder: Path, base: Path, dtype: torch.dtype = torch.float32) -> Applied:
    """The saved adapter on the base, checked to be what its description and its page say."""
    parsed, served = parse(folder), load_base(base, dtype)
    result = parsed.lower(served)
    check_order(result)
    primitives = result.parts[0].primitives
    assert {each.path for each in parsed.shapes} >= {each.path for each in primitives}
    config = json.loads((folder / "adapter_config.json").read_text())
    if config.get("bias", "none") == "none" and not config["modules_to_save"]:
        stored = {type(each).__name__ for each in primitives}
        kind = kind_of(folder)
        assert stored <= set(kind.page.primitives)
        if kind.name not in ("vera", "hra"):  # whose tensors do not tell the module's widths
            assert stored == {each.primitive for each in parsed.shapes}
    return Applied.of(result, served)


def adapted(model: PeftModel) -> dict[str, nn.Module]:
    """Every module that is not the base's own, by its path in the base."""
    return {
        path.removeprefix("base_model.model."): module
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)
    }


@torch.inference_mode()
def check(model: PeftModel, applied: Applied, case: Case, tolerance: float) -> None:
    """Every module of the layout gives what PEFT's gives; the adapted ones differ from the base."""
    check_linears(model, applied, case, tolerance)
    check_others(model, applied, tolerance)


@torch.inference_mode()
def check_linears(model: PeftModel, applied: Applied, case: Case, tolerance: float) -> None:
    layout, base = applied.base.layout, applied.base
    changed = adapted(model)
    extra = {"task_ids": torch.tensor([case.options.get("task_id", 0)])}
    for path, target in layout.targets.items():
        module = model.get_submodule(f"base_model.model.{path}")
        x = torch.randn(1, 5, target.in_features, dtype=base.dtype)
        given = extra if case.config is POLY and path in changed else {}
        theirs = module(x, **given)[0]
        ours = applied.linear(target, x[0])
        size = max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(ours, theirs, atol=tolerance * size, rtol=0, msg=path)
        if path in changed:
            own = torch.nn.functional.linear(x[0], *base.linear(target))
            assert float((own - theirs).abs().max()) > 0.01, path


@torch.inference_mode()
def check_others(model: PeftModel, applied: Applied, tolerance: float) -> None:
    layout, base = applied.base.layout, applied.base
    for site in layout.embeddings:
        module = model.get_submodule(f"base_model.model.{site.path}")
        ids = torch.randint(site.num_embeddings, (7,))
        torch.testing.assert_close(
            applied.embedding(site, ids), module(ids), atol=tolerance, rtol=0
        )
    for norm in layout.norms:
        module = model.get_submodule(f"base_model.model.{norm.path}")
        x = torch.randn(4, norm.size)
        own = base.norm(norm)
        eps, centered = getattr(module, "eps", None), norm.has_bias
        eps = module.variance_epsilon if eps is None else eps
        y = x - x.mean(-1, keepdim=True) if centered else x
        y = y / (y.square().mean(-1, keepdim=True) + eps).sqrt() * own.weight
        y = y if own.bias is None else y + own.bias
        ours = applied.norm(norm, y, x, eps, centered)
        torch.testing.assert_close(ours, module(x), atol=1e-4, rtol=0, msg=norm.path)


@pytest.mark.parametrize("name", CASES)
def test_every_module_computes_what_peft_computes(
    name: str, tiny_model: MakeModel, tmp_path: Path
) -> None:
    case, base = CASES[name], tiny_model(CASES[name].family)
    model = save(case, base, tmp_path)
    with library():
        check(model, lowered(tmp_path, base), case, TOLERANCE)


@pytest.mark.parametrize(
    "name",
    [
        "loha",
        "loha, too wide",
        "lokr",
        "vera",
        "vblora, topk",
        "randlora",
        "fourierft",
        "shira, seed",
        "miss, uneven",
        "miss, bat",
        "c3a",
        "hra, biases",
        "oft",
        "boft, biases",
        "boft, 3 factors",
        "poly, task 1",
    ],
)
def test_in_bfloat16_the_rounding_is_the_only_difference(
    name: str, tiny_model: MakeModel, tmp_path: Path
) -> None:
    case, base, dtype = CASES[name], tiny_model(CASES[name].family), torch.bfloat16
    save(case, base, tmp_path)
    model = reload(base, tmp_path, dtype)
    with library():
        check_linears(model, lowered(tmp_path, base, dtype), case, BFLOAT16_TOLERANCE)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("loha", {"Affine": 14}),
        ("loha, too wide", {"Dense": 14}),
        ("lokr", {"Kronecker": 14}),
        ("vera, own biases", {"Affine": 14}),
        ("vera, qwen3", {"Dense": 12, "Affine": 2}),
        ("vblora", {"Affine": 14}),
        ("randlora", {"Dense": 14}),
        ("fourierft", {"Spectral": 14}),
        ("shira", {"Sparse": 14}),
        ("miss, mini", {"Affine": 14}),
        ("miss, bat, biases", {"Dense": 14, "Affine": 6}),
        ("c3a", {"Circulant": 14}),
        ("hra, biases", {"Affine": 14}),
        ("hra, rank over the width", {"Dense": 2}),
        ("oft", {"InputTransform": 14}),
        ("boft, 3 factors", {"InputTransform": 14, "Affine": 14}),
        ("poly, splits", {"Affine": 14}),
    ],
)
def test_the_cheapest_exact_form_is_stored(
    name: str, expected: dict[str, int], tiny_model: MakeModel, tmp_path: Path
) -> None:
    base = tiny_model(CASES[name].family)
    save(CASES[name], base, tmp_path)
    (part,) = parse(tmp_path).lower(load_base(base, torch.float32)).parts
    assert Counter(type(each).__name__ for each in part.primitives) == expected


@pytest.mark.parametrize("name", ["vera", "vera, drawn", "miss", "miss, mini"])
def test_modules_of_one_width_share_their_first_factor(
    name: str, tiny_model: MakeModel, tmp_path: Path
) -> None:
    base = tiny_model("llama")
    save(CASES[name], base, tmp_path)
    (part,) = parse(tmp_path).lower(load_base(base, torch.float32)).parts
    first = [each.a for each in part.primitives if isinstance(each, Affine)]
    assert len({id(a) for a in first}) == len({a.shape[1] for a in first}) == 2


@pytest.mark.parametrize(
    ("name", "has_up"),
    [("lokr", True), ("lokr, whole", False), ("lokr, product is smaller whole", False)],
)
def test_the_right_kronecker_factor_stays_a_product_where_that_is_smaller(
    name: str, has_up: bool, tiny_model: MakeModel, tmp_path: Path
) -> None:
    base = tiny_model("llama")
    save(CASES[name], base, tmp_path)
    (part,) = parse(tmp_path).lower(load_base(base, torch.float32)).parts
    assert [isinstance(each, Kronecker) and each.up is not None for each in part.primitives] == (
        [has_up] * 14
    )


@pytest.mark.parametrize("name", ["miss, uneven", "miss, bat"])
def test_bone_is_miss_under_its_first_name(
    name: str, tiny_model: MakeModel, tmp_path: Path
) -> None:
    """PEFT 0.21.2 has no Bone; the last version that has one computes it line by line as MiSS."""
    case, base = CASES[name], tiny_model(CASES[name].family)
    model = save(case, base, tmp_path)
    edit_config(tmp_path, peft_type="BONE", mini_r=None, miss_dropout=None)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    renamed = {key.replace("miss_block", "bone_block"): t for key, t in tensors.items()}
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    check(model, lowered(tmp_path, base), case, TOLERANCE)


def test_without_its_extension_peft_saves_one_butterfly_factor_whatever_was_asked_for(
    tiny_model: MakeModel, tmp_path: Path
) -> None:
    case, base = CASES["boft"], tiny_model("llama")
    model = save(case, base, tmp_path)
    edit_config(tmp_path, boft_n_butterfly_factor=3)
    applied = lowered(tmp_path, base)
    with library():
        check(model, applied, case, TOLERANCE)


def test_shira_of_windows_has_float_indices(tiny_model: MakeModel, tmp_path: Path) -> None:
    case, base = CASES["shira"], tiny_model("llama")
    model = save(case, base, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor.float() for name, tensor in tensors.items()}, file)
    with library():
        check(model, lowered(tmp_path, base), case, TOLERANCE)


def test_shira_entries_at_one_place_add_up(tiny_model: MakeModel, tmp_path: Path) -> None:
    case, base = CASES["shira"], tiny_model("llama")
    save(case, base, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("q_proj.shira_indices"))
    tensors[name][:, 1::2] = tensors[name][:, 0::2]
    save_file(tensors, file)
    with library():
        check(reload(base, tmp_path), lowered(tmp_path, base), case, TOLERANCE)


def test_half_precision_checkpoints_are_computed_in_float32(
    tiny_model: MakeModel, tmp_path: Path
) -> None:
    case, base = CASES["hra"], tiny_model("llama")
    save(case, base, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    check(reload(base, tmp_path), lowered(tmp_path, base), case, TOLERANCE)


def test_what_only_scales_or_rotates_is_no_sum(tiny_model: MakeModel, tmp_path: Path) -> None:
    base = tiny_model("qwen2")
    save(CASES["boft, biases"], base, tmp_path)
    (part,) = parse(tmp_path).lower(load_base(base, torch.float32)).parts
    assert {type(each) for each in part.primitives} == {Affine, InputTransform}
    assert not any(each.is_sum for each in part.primitives)


def edit_config(folder: Path, **fields: object) -> None:
    """Set fields of the configuration; None removes one."""
    file = folder / "adapter_config.json"
    config = {**json.loads(file.read_text()), **fields}
    file.write_text(
        json.dumps({name: v for name, v in config.items() if name not in fields or v is not None})
    )
