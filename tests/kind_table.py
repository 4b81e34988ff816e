"""README's table of kinds: what serves each with each library, or why it is refused.

``python -m tests.kind_table`` prints it; ``test_repository.py`` holds README to it, and every test
that it names to those that there are.
"""

import sys
from dataclasses import dataclass

NONE = ""
"""The library does not know the kind."""


@dataclass(frozen=True)
class Row:
    """One kind; a cell is the name of a case of ``test_kinds.py::test_served``, or plain words.

    Attributes:
        kind: As people call it.
        peft: Saved by PEFT.
        adapterhub: Saved by AdapterHub.
        plain: In deltamux's plain format.
    """

    kind: str
    peft: str = NONE
    adapterhub: str = NONE
    plain: str = NONE


GATED = "refused: its gates are means over the whole sequence"
TABLE: tuple[tuple[str, tuple[Row, ...]], ...] = (
    (
        "Reparameterisation",
        (
            Row("LoRA, QLoRA checkpoints", "llama-peft-lora", "llama-adapterhub-lora"),
            Row("rsLoRA; rank and alpha patterns", "llama-peft-lora-rslora-patterns"),
            Row("LoRA with biases", "gpt2-peft-lora-bias-all"),
            Row("LoRA on embeddings", "llama-peft-lora-embedding"),
            Row("LoRA on `lm_head`", "qwen2-peft-lora-head"),
            Row(
                "`modules_to_save`",
                "llama-peft-lora-save-layer",
                "llama-adapterhub-seq_bn_trained_head",
            ),
            Row("trainable tokens", "qwen3-peft-trainable-tokens"),
            Row("`target_parameters`", "gpt2-peft-lora-parameters"),
            Row("PiSSA, unconverted", "llama-peft-lora-pissa"),
            Row("OLoRA, unconverted", "llama-peft-lora-olora"),
            Row("KaSA", "llama-peft-lora-kasa"),
            Row("BD-LoRA", "llama-peft-lora-bdlora"),
            Row("QA-LoRA", "llama-peft-lora-qalora"),
            Row("DoRA", "llama-peft-dora", "llama-adapterhub-dora"),
            Row("DoRA on embeddings", "gpt2-peft-dora-embedding"),
            Row("activated LoRA (aLoRA)", "llama-peft-alora"),
            Row("AdaLoRA", "llama-peft-adalora-pruned"),
            Row("LoHa", "llama-peft-loha"),
            Row("LoKr", "llama-peft-lokr"),
            Row("VeRA", "llama-peft-vera", "llama-adapterhub-vera"),
            Row("DVoRA", adapterhub="llama-adapterhub-dvora"),
            Row("VB-LoRA", "llama-peft-vblora"),
            Row("RandLoRA", "llama-peft-randlora"),
            Row("FourierFT", "llama-peft-fourierft"),
            Row("SHiRA", "llama-peft-shira"),
            Row("MiSS, Bone", "llama-peft-miss"),
            Row("C3A", "llama-peft-c3a"),
            Row("HRA", "llama-peft-hra"),
            Row("OFT", "llama-peft-oft"),
            Row("BOFT", "llama-peft-boft-butterfly"),
            Row("Poly", "llama-peft-poly-task-1"),
            Row("X-LoRA", "refused: PEFT saves its router incompletely"),
            Row("Arrow, layer replication, LoftQ", "refused: no shared frozen base computes them"),
        ),
    ),
    (
        "Addition",
        (
            Row("Houlsby", adapterhub="llama-adapterhub-double_seq_bn"),
            Row("Pfeiffer", adapterhub="llama-adapterhub-seq_bn"),
            Row("parallel", adapterhub="llama-adapterhub-par_bn"),
            Row("scaled parallel", adapterhub="llama-adapterhub-scaled_par_bn"),
            Row("AdapterPlus", adapterhub="llama-adapterhub-adapter_plus"),
            Row("Compacter", adapterhub="llama-adapterhub-compacter"),
            Row("Compacter++", adapterhub="llama-adapterhub-compacter_plus_plus"),
            Row("norms inside a bottleneck", adapterhub="refused: `ln_before`, `ln_after`"),
            Row("prompt tuning", "llama-peft-prompt-tuning", "refused: the library cannot run it"),
            Row("P-tuning, MLP", "llama-peft-p-tuning-mlp"),
            Row("P-tuning, LSTM", "llama-peft-p-tuning-lstm"),
            Row(
                "prefix tuning, P-tuning v2",
                "llama-peft-prefix-tuning",
                "llama-adapterhub-prefix_flat",
            ),
            Row(
                "prefix tuning with projection",
                "llama-peft-prefix-tuning-projection",
                "llama-adapterhub-prefix_mlp",
            ),
            Row("multitask prompt tuning", "llama-peft-multitask-task-1"),
            Row("CPT", "llama-peft-cpt"),
            Row("MAM, unions", adapterhub="llama-adapterhub-mam"),
            Row("UniPELT, any `use_gating`", adapterhub=GATED),
            Row("LoReFT", adapterhub="llama-adapterhub-loreft"),
            Row("NoReFT", adapterhub="llama-adapterhub-noreft"),
            Row("DiReFT", adapterhub="llama-adapterhub-direft"),
            Row("Llama-Adapter", "llama-peft-adaption-prompt"),
            Row("IA3", "llama-peft-ia3", "llama-adapterhub-ia3"),
            Row("AdapterFusion", adapterhub="refused: attention between adapters"),
        ),
    ),
    (
        "Specification",
        (
            Row("BitFit", "gpt2-peft-lora-bias-all", plain="llama-plain-bitfit"),
            Row("last k layers (freeze)", "llama-peft-lora-save-layer", plain="llama-plain-freeze"),
            Row("LN tuning", "llama-peft-ln-tuning", plain="llama-plain-tensors"),
            Row("any replaced or added tensors", plain="llama-plain-tensors-added"),
            Row("SAID (Fastfood)", plain="llama-plain-said"),
        ),
    ),
)


def named_tests() -> set[str]:
    """Every test in the table."""
    cells = (
        cell for _, rows in TABLE for row in rows for cell in (row.peft, row.adapterhub, row.plain)
    )
    return {cell for cell in cells if _is_test(cell)}


def render() -> str:
    """The table in Markdown."""
    lines = ["| kind | PEFT 0.21.2 | AdapterHub 1.3.0 | plain |", "|---|---|---|---|"]
    for family, rows in TABLE:
        lines.append(f"| **{family}** | | | |")
        lines += (
            f"| {row.kind} | {_cell(row.peft)} | {_cell(row.adapterhub)} | {_cell(row.plain)} |"
            for row in rows
        )
    return "\n".join(lines)


def _is_test(cell: str) -> bool:
    return bool(cell) and not cell.startswith("refused")


def _cell(cell: str) -> str:
    return f"`{cell}`" if _is_test(cell) else cell


if __name__ == "__main__":
    sys.stdout.write(render() + "\n")
