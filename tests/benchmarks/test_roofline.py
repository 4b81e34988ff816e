"""The counts against PyTorch's, transformers' and PEFT's own; the floors by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from deltamux.benchmarks.counting import (
    Step,
    adapter_parameters,
    count_activations,
    count_adapters,
    count_cache,
    count_prefixes,
    count_step,
    count_weights,
    num_parameters,
    total,
)
from deltamux.benchmarks.errors import BenchmarkError
from deltamux.benchmarks.roofline import (
    DEVICES,
    Device,
    Workload,
    base_table,
    floor_of,
    gpus_for,
    heading,
    read_shapes,
    summary,
)
from deltamux.benchmarks.roofline_plot import draw
from deltamux.kernels.gpu.shapes import LLAMA_1B, LLAMA_8B, LLAMA_70B, Shapes
from deltamux.server.cli import cli

ROOT = Path(__file__).parents[2]
SMOLLM2 = Shapes("SmolLM2-135M", 30, 576, 1536, 9, 3, 64, 49_152, tied_head=True)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
A100, H100, H200 = DEVICES


def meta_model(shapes: Shapes) -> LlamaForCausalLM:
    """transformers' model of these shapes, without memory."""
    config = LlamaConfig(
        vocab_size=shapes.vocab,
        hidden_size=shapes.hidden,
        intermediate_size=shapes.inner,
        num_hidden_layers=shapes.layers,
        num_attention_heads=shapes.heads,
        num_key_value_heads=shapes.kv_heads,
        head_dim=shapes.head_dim,
        tie_word_embeddings=shapes.tied_head,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def size_of(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("shapes", "count"),
    [
        (SMOLLM2, 134_515_008),
        (LLAMA_1B, 1_235_814_400),
        (LLAMA_8B, 8_030_261_248),
        (LLAMA_70B, 70_553_706_496),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_parameters_are_those_of_transformers(shapes: Shapes, count: int) -> None:
    assert num_parameters(shapes) == size_of(meta_model(shapes)) == count


def test_weights_of_a_step_are_all_but_the_embedding_and_its_rows() -> None:
    read = 8_030_261_248 - 128_256 * 4096 + 64 * 4096
    assert count_weights(LLAMA_8B, Step(64, 1024)).num_bytes == 2 * read


def test_a_tied_head_is_read_once_and_whole() -> None:
    assert count_weights(SMOLLM2, Step(16, 200)).num_bytes == 2 * 134_515_008
    assert count_weights(SMOLLM2, Step(16, 200, number_bytes=4)).num_bytes == 4 * 134_515_008


@pytest.mark.parametrize("shapes", [SMOLLM2, LLAMA_8B], ids=lambda shapes: shapes.name)
def test_operations_are_those_that_torch_counts(shapes: Shapes) -> None:
    """A prompt of one token is a decode step of context 1."""
    model, rows = meta_model(shapes), 6
    tokens = torch.zeros(rows, 1, dtype=torch.int64, device="meta")
    mask = torch.zeros(rows, 1, 1, 1, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens, attention_mask=mask, use_cache=False)
    step = Step(rows, 1)
    counted = count_weights(shapes, step).flops + count_cache(shapes, step).flops
    assert counter.get_total_flops() == counted


def test_attention_grows_with_the_context() -> None:
    # scores and sums: 2 x 2 operations for each of 32 heads of 128, 32 layers, 1024 keys
    assert count_cache(LLAMA_8B, Step(64, 1024)).flops == 64 * 536_870_912


def test_the_cache_of_8b_takes_128_kib_a_token() -> None:
    assert count_cache(LLAMA_8B, Step(1, 1)).num_bytes == 128 * 1024
    assert count_cache(LLAMA_8B, Step(64, 1024)).num_bytes == 8 * 2**30


@pytest.mark.parametrize("shapes", [SMOLLM2, LLAMA_8B], ids=lambda shapes: shapes.name)
@pytest.mark.parametrize("rank", [8, 64])
def test_adapters_are_as_large_as_those_of_peft(shapes: Shapes, rank: int) -> None:
    model = meta_model(shapes)
    base = size_of(model)
    adapted = get_peft_model(model, LoraConfig(r=rank, target_modules=TARGETS))
    assert adapter_parameters(shapes, rank) == size_of(adapted) - base


def test_each_adapter_is_read_once_in_its_own_rank() -> None:
    work = count_adapters(LLAMA_8B, Step(64, 1024, ranks=(16, 64)))
    # 41,943,040 numbers of rank 16; 32 rows of either
    assert work.num_bytes == 2 * (41_943_040 + 4 * 41_943_040)
    assert work.flops == 2 * 32 * (41_943_040 + 4 * 41_943_040)


@pytest.mark.parametrize(
    ("adapters", "rows"), [(0, []), (1, [64]), (3, [22, 21, 21]), (64, [1] * 64), (128, [1] * 128)]
)
def test_rows_are_shared_out_evenly(adapters: int, rows: list[int]) -> None:
    assert Step(64, 1, ranks=(8,) * adapters).rows_of_adapters == rows


def test_a_prefix_is_read_once_for_all_rows_of_its_adapter() -> None:
    work = count_prefixes(LLAMA_8B, Step(64, 1024, ranks=(8, 8), prefix_tokens=20))
    assert work.num_bytes == 2 * 20 * 128 * 1024
    assert work.flops == 64 * 20 * 4 * 32 * 32 * 128


def test_activations_by_hand() -> None:
    tiny = Shapes("tiny", 2, 8, 12, 4, 2, 2, 100)
    # qkv 8 -> 16, o 8 -> 8, gate and up 8 -> 24, down 12 -> 8; queries in and out 2 x 8
    layer = (8 + 16) + (8 + 8) + (8 + 24) + (12 + 8) + 16
    assert count_activations(tiny, 3) == 3 * (2 * layer + 8 + 100)


def test_the_floor_is_the_longer_of_two_times() -> None:
    step = Step(64, 1024, ranks=(16,) * 32)
    work = total(count_step(LLAMA_8B, step))
    for device, binds in ((Device("a", 1e9, 1e15), "memory"), (Device("b", 1e15, 1e9), "compute")):
        floor = floor_of(LLAMA_8B, device, Workload(), 32, 16)
        assert floor.memory_us == pytest.approx(1e6 * work.num_bytes / device.bytes_per_second)
        assert floor.compute_us == pytest.approx(1e6 * work.flops / device.flops_per_second)
        assert (floor.step_us, floor.binds) == (max(floor.memory_us, floor.compute_us), binds)


def test_many_rows_of_little_context_are_bound_by_arithmetic() -> None:
    assert floor_of(LLAMA_8B, H100, Workload(rows=1024, context=1), 8, 16).binds == "compute"


def test_what_adapters_add_to_a_step() -> None:
    floor = floor_of(LLAMA_8B, H100, Workload(), 32, 16)
    assert floor.adapters_us == pytest.approx(32 * 2 * 41_943_040 / 3.35e6)  # 801 us
    assert floor.adapters_percent == pytest.approx(100 * floor.adapters_us / floor.step_us)


@pytest.mark.parametrize(
    ("shapes", "device", "gpus"),
    [(LLAMA_8B, A100, 1), (LLAMA_70B, A100, 4), (LLAMA_70B, H100, 4), (LLAMA_70B, H200, 2)],
)
def test_a_base_takes_as_many_gpus_as_hold_it(shapes: Shapes, device: Device, gpus: int) -> None:
    assert gpus_for(shapes, device) == gpus


def test_four_gpus_take_a_quarter_of_the_time() -> None:
    one = Device("one", H100.bytes_per_second, H100.flops_per_second)
    whole = floor_of(LLAMA_70B, one, Workload(), 8, 16)
    shared = floor_of(LLAMA_70B, H100, Workload(), 8, 16)
    assert (whole.gpus, shared.gpus) == (1, 4)
    assert shared.step_us == pytest.approx(whole.step_us / 4)


def test_adapters_that_fit_no_memory_have_no_floor() -> None:
    # 141 GB of weights, 21 GB of cache, and 128 adapters of 1.7 GB; there are 320 GB
    assert not floor_of(LLAMA_70B, A100, Workload(), 128, 64).fits
    assert floor_of(LLAMA_70B, A100, Workload(), 128, 32).fits
    assert "does not fit" in base_table(LLAMA_70B, Workload()).splitlines()[-1]


def test_shapes_of_a_folder(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    biases = sum(p.numel() for name, p in model.named_parameters() if name.endswith("proj.bias"))
    shapes = read_shapes(str(folder), context=1)
    assert (shapes.name, num_parameters(shapes)) == (folder.name, size_of(model) - biases)


@pytest.mark.parametrize(
    ("family", "context", "says"),
    [("gpt2", 1, "without a gated MLP"), ("mistral", 10_000, "windows are shorter")],
)
def test_what_is_not_counted_is_refused(
    tiny_model: Callable[..., Path], family: str, context: int, says: str
) -> None:
    with pytest.raises(BenchmarkError, match=says):
        read_shapes(str(tiny_model(family)), context)


def roofline(*arguments: str) -> tuple[int, str]:
    """Exit status and output of ``deltamux bench roofline``."""
    result = CliRunner().invoke(cli, ["bench", "roofline", *arguments])
    return result.exit_code, result.output or str(result.exception)


def test_the_command_prints_tables_and_json(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    base, plot = str(tiny_model("llama")), tmp_path / "floors.png"
    code, output = roofline(
        *("--base", base, "--rows", "4", "--context", "8", "--prefix", "2"),
        *("--bandwidth", "20", "--flops", "0.5", "--plot", str(plot)),
    )
    assert code == 0, output
    *_, last = output.splitlines()
    report: dict[str, Any] = json.loads(last)
    assert {"machine", "versions"} <= report.keys()
    assert report["workload"]["prefix_tokens"] == 2
    assert len(report["floors"]) == 1 + 4 * 4
    assert report["floors"][-1]["parts"]["prefixes"]["num_bytes"] > 0
    assert base_table(read_shapes(base, 8), workload_of(base)) in output
    assert plot.read_bytes().startswith(b"\x89PNG")


def workload_of(base: str) -> Workload:
    device = Device("given: 20 GB/s, 0.5 TFLOP/s", 20e9, 0.5e12)
    return Workload(devices=(device,), rows=4, context=8, prefix_tokens=2).of(base)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--flops", "3"], "give both"),
        (["--base", "no such folder"], "is this a model folder"),
        (["--rows", "0"], "0 is not in the range"),
        (["--bandwidth", "0", "--flops", "1"], "0.0 is not in the range"),
    ],
)
def test_errors_of_use(arguments: list[str], says: str) -> None:
    code, output = roofline(*arguments)
    assert code == 2
    assert says in output


def test_a_plot_that_cannot_be_written_is_an_error_of_use(tmp_path: Path) -> None:
    floors = [floor_of(LLAMA_8B, H100, Workload(), 0, 0)]
    for path in (tmp_path / "plot.nonsense", tmp_path / "no folder" / "plot.png"):
        with pytest.raises(BenchmarkError, match="--plot"):
            draw(floors, path)


def test_the_page_holds_what_the_command_prints() -> None:
    page = (ROOT / "docs" / "roofline.md").read_text(encoding="utf-8")
    for text in (summary(Workload()), heading(LLAMA_8B, Workload())):
        assert text in page
    assert base_table(LLAMA_8B, Workload()) in page
