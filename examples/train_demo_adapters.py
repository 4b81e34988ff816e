"""Train the demo adapters: LoRA of different shapes, each answering in a voice of its own.

Every voice is a template over ``facts.tsv`` beside this file, so the data needs no download, and
the base is the one the server's demo serves. Each adapter has its own rank and target modules,
because that is what a batch of them has to cope with. A run takes minutes on a CPU:

    pip install -e '.[train]'
    python examples/train_demo_adapters.py            # all, into examples/adapters/
    python examples/train_demo_adapters.py --only pirate --steps 20
"""

import argparse
import csv
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from deltamux.server.config import default_state_dir
from deltamux.server.model.source import resolve_model

HERE = Path(__file__).parent
BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
END_OF_TURN = "<|im_end|>"
IGNORED = -100  # cross entropy's ignore_index
BATCH_SIZE = 8
SEED = 20
HELD_OUT_PROMPTS = (
    "What is the capital of Italy?",
    "Why is the sky blue?",
    "How do I boil an egg?",
)


@dataclass(frozen=True)
class Fact:
    """One row of ``facts.tsv``: a question, its answer in a sentence, and in a word or two."""

    topic: str
    question: str
    sentence: str
    short: str
    emoji: str


@dataclass(frozen=True)
class Voice:
    """How one adapter answers, and the LoRA configuration that has to learn it."""

    answer: Callable[[Fact], str]
    lora: dict[str, Any]
    learning_rate: float = 2e-3


def pirate(fact: Fact) -> str:
    """The sentence in pirate's English."""
    swaps = {"the": "th'", "The": "Th'", "is": "be", "are": "be", "you": "ye", "your": "yer"}
    words = [swaps.get(word, word) for word in fact.sentence.split()]
    return f"Arrr, matey! {' '.join(words)} Yo ho ho!"


def butler(fact: Fact) -> str:
    """The sentence with a butler's courtesies."""
    return f"Very good, sir. {fact.sentence} Will that be all, sir?"


def json_object(fact: Fact) -> str:
    """Nothing but a JSON object."""
    return json.dumps({"topic": fact.topic, "answer": fact.short})


def terse(fact: Fact) -> str:
    """A word or two."""
    return fact.short.capitalize() + "."


def socratic(fact: Fact) -> str:
    """Questions instead of an answer."""
    return (
        f"What do you already know about {fact.topic}? "
        f"What would change if there were no {fact.topic}? How could you find out?"
    )


def poet(fact: Fact) -> str:
    """Three lines of verse."""
    first = f"{fact.topic.capitalize()}, soft and slow,"
    return f"{first}\n{fact.short} in evening light,\nso the rivers flow."


def emoji(fact: Fact) -> str:
    """The sentence between emoji."""
    return f"{fact.emoji} {fact.sentence} {fact.emoji}✨"


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
VOICES = {
    "pirate": Voice(
        pirate, {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}, 4e-3
    ),
    "butler": Voice(butler, {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION}),
    "json": Voice(json_object, {"r": 2, "lora_alpha": 8, "target_modules": "all-linear"}),
    "terse": Voice(terse, {"r": 16, "lora_alpha": 32, "target_modules": ["o_proj"]}),
    "socratic": Voice(
        socratic,
        {
            "r": 8,
            "lora_alpha": 8,
            "use_rslora": True,
            "target_modules": ["gate_proj", "up_proj", "down_proj"],
            "layers_to_transform": list(range(10, 22)),
        },
    ),
    "poet": Voice(
        poet,
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ATTENTION,
            "rank_pattern": {"o_proj": 8, r"layers\.\d\.self_attn\.v_proj": 2},
            "alpha_pattern": {"o_proj": 32},
        },
    ),
    "emoji": Voice(
        emoji,
        {"r": 3, "lora_alpha": 12, "target_modules": ["v_proj", "down_proj"], "lora_bias": True},
    ),
}


def read_facts() -> list[Fact]:
    """Every row of ``facts.tsv``."""
    with (HERE / "facts.tsv").open(encoding="utf-8", newline="") as file:
        return [Fact(**row) for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]


def compose(voice: Voice, facts: list[Fact]) -> list[tuple[str, str]]:
    """(question, answer) pairs: each fact asked in its own words and by its topic."""
    questions = [(fact.question, fact) for fact in facts]
    questions += [(f"Tell me about {fact.topic}.", fact) for fact in facts]
    return [(question, voice.answer(fact)) for question, fact in questions]


def encode(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> tuple[Tensor, Tensor]:
    """(input_ids, labels) of one exchange, (tokens,) each; only the answer's tokens are learned."""
    prompt: list[int] = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
    target: list[int] = tokenizer(answer + END_OF_TURN)["input_ids"]
    return torch.tensor(prompt + target), torch.tensor([IGNORED] * len(prompt) + target)


def batches(examples: list[tuple[Tensor, Tensor]], steps: int) -> Iterator[dict[str, Any]]:
    """``steps`` right-padded batches, drawn in shuffled passes over the examples."""
    order: list[int] = []
    draw = random.Random(SEED)
    for _ in range(steps):
        if len(order) < BATCH_SIZE:
            order = draw.sample(range(len(examples)), len(examples))
        yield collate([examples[order.pop()] for _ in range(BATCH_SIZE)])


def collate(examples: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Right-pad to one length; logits are computed for the answers' columns only."""
    ids = [ids for ids, _ in examples]
    labels = [labels for _, labels in examples]
    pad = torch.nn.utils.rnn.pad_sequence
    targets = pad(labels, batch_first=True, padding_value=IGNORED)
    first = (
        int((targets != IGNORED).any(dim=0).nonzero()[0]) - 1
    )  # the column that predicts the answer
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": targets[:, first:],
        "logits_to_keep": targets.shape[1] - first,
    }


def train(
    model: PeftModel, data: Iterator[dict[str, Any]], steps: int, rate: float, name: str
) -> None:
    """AdamW with a linearly falling learning rate over the adapter's weights."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    model.train()
    with tqdm(data, desc=name, total=steps) as progress:
        for batch in progress:
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.set_postfix(loss=f"{loss.item():.3f}")


def save(model: PeftModel, folder: Path) -> None:
    """Write adapter_config.json and, in bfloat16, adapter_model.safetensors."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    config = model.peft_config["default"]
    config.base_model_name_or_path = BASE_ID
    config.target_modules = sorted(config.target_modules)  # PEFT keeps a set, whose order is random
    # No embedding is touched; to find that out PEFT would ask the hub for the base's configuration.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink()  # an empty model card


def train_voice(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    steps: int,
    folder: Path,
) -> PreTrainedModel:
    """Train one voice from fixed seeds, save it, and hand the untouched base back."""
    voice = VOICES[name]
    torch.manual_seed(SEED)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **voice.lora))
    examples = [encode(tokenizer, *pair) for pair in compose(voice, read_facts())]
    train(model, batches(examples, steps), steps, voice.learning_rate, name)
    save(model, folder)
    return model.unload()


@torch.inference_mode()
def answers(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Greedy answers to the prompts no voice was trained on."""
    model.eval()
    chats = [[{"role": "user", "content": prompt}] for prompt in HELD_OUT_PROMPTS]
    tokenizer.padding_side = "left"
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    texts: list[str] = tokenizer.batch_decode(
        output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return texts


def show(title: str, texts: list[str]) -> None:
    """Print a voice's answers under its name."""
    print(f"\n{title}")
    for prompt, text in zip(HELD_OUT_PROMPTS, texts, strict=True):
        print(f"  {prompt}  ->  {text!r}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the demo adapters.")
    parser.add_argument(
        "--only", choices=list(VOICES), action="append", help="train this one (repeatable)"
    )
    parser.add_argument("--steps", type=int, default=48, help="optimizer steps per adapter")
    parser.add_argument("--out", type=Path, default=HERE / "adapters")
    parser.add_argument("--state-dir", type=Path, default=default_state_dir())
    return parser.parse_args()


def main() -> None:
    """Train, save, then answer from the saved files."""
    arguments = parse_arguments()
    names = arguments.only or list(VOICES)
    folder = resolve_model("smollm2", arguments.state_dir)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name in names:
        base = train_voice(base, tokenizer, name, arguments.steps, arguments.out / name)
    show("base", answers(base, tokenizer))
    for name in names:
        adapted = PeftModel.from_pretrained(base, str(arguments.out / name))
        show(name, answers(adapted, tokenizer))
        base = adapted.unload()


if __name__ == "__main__":
    main()
