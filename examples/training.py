"""What training a demo adapter takes, whatever its kind: the data, the loop, the greedy answers.

The scripts beside this file name the voices, and the method that has to learn each. This file
needs torch and transformers and nothing else, because the libraries of these methods do not all
live in one environment.
"""

import argparse
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from voices import HELD_OUT_PROMPTS, Fact, read_facts

BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
ADAPTERS = Path(__file__).with_name("adapters")
END_OF_TURN = "<|im_end|>"
IGNORED = -100  # cross entropy's ignore_index
BATCH_SIZE = 8
SEED = 20


class Method(Protocol):
    """A kind of adapter, as its library trains and stores it."""

    def attach(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
        """The base with a fresh adapter, whose weights alone require gradients."""

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the adapter of what ``attach`` returned; its weights are bfloat16."""

    def load(self, base: PreTrainedModel, folder: Path) -> nn.Module:
        """The base with the adapter that ``save`` wrote."""


@dataclass(frozen=True)
class Voice:
    """How an adapter answers, and the method that has to learn it."""

    answer: Callable[[Fact], str]
    method: Method
    learning_rate: float = 2e-3
    steps: int = 48


@dataclass(frozen=True)
class Base:
    """The frozen model. Every adapter is trained and tried on a copy of its own."""

    load: Callable[[], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase


def compose(voice: Voice) -> list[tuple[str, str]]:
    """(question, answer) pairs: each fact asked in its own words and by its topic."""
    facts = read_facts()
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


def batches(
    examples: list[tuple[Tensor, Tensor]], steps: int
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """``steps`` right-padded batches, drawn in shuffled passes over the examples."""
    order: list[int] = []
    draw = random.Random(SEED)
    for _ in range(steps):
        if len(order) < BATCH_SIZE:
            order = draw.sample(range(len(examples)), len(examples))
        yield collate([examples[order.pop()] for _ in range(BATCH_SIZE)])


def collate(examples: list[tuple[Tensor, Tensor]]) -> tuple[dict[str, Any], Tensor]:
    """Right-pad to one length: the model's arguments, and the labels (rows, columns) of its logits.

    Logits are computed for the columns that predict an answer, and for the last one of all.
    """
    ids = [ids for ids, _ in examples]
    pad = torch.nn.utils.rnn.pad_sequence
    labels = pad([row for _, row in examples], batch_first=True, padding_value=IGNORED)
    first = int((labels != IGNORED).any(dim=0).nonzero()[0])
    inputs = {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
        "logits_to_keep": labels.shape[1] - first + 1,
    }
    return inputs, labels[:, first:]


def loss_of(model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> Tensor:
    """Mean cross entropy of the answers' tokens, in bfloat16 where the processor multiplies it."""
    enabled = torch.cpu.get_capabilities().get("avx512_bf16", False)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        logits = model(**inputs).logits[:, :-1]  # of virtual tokens, if there are any, none is kept
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def train(model: nn.Module, examples: list[tuple[Tensor, Tensor]], voice: Voice, name: str) -> None:
    """AdamW with a linearly falling learning rate over the adapter's weights."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=voice.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=voice.steps)
    model.train()
    with tqdm(batches(examples, voice.steps), desc=name, total=voice.steps) as progress:
        for inputs, labels in progress:
            loss = loss_of(model, inputs, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.set_postfix(loss=f"{loss.item():.3f}")


def train_voice(base: Base, name: str, voice: Voice, folder: Path) -> None:
    """Train one voice from fixed seeds and save it."""
    torch.manual_seed(SEED)
    model = voice.method.attach(base.load(), base.tokenizer)
    train(model, [encode(base.tokenizer, *pair) for pair in compose(voice)], voice, name)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    folder.mkdir(parents=True, exist_ok=True)
    voice.method.save(model, folder)


@torch.inference_mode()
def show_answers(title: str, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print the greedy answers to the prompts no voice was trained on.

    One prompt at a time: some libraries misplace the virtual tokens of rows that are padded.
    """
    model.eval()
    print(f"\n{title}")
    for prompt in HELD_OUT_PROMPTS:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=False,
        )
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pad_token_id=tokenizer.pad_token_id,
            max_new_tokens=48,
            do_sample=False,
        )
        answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        print(f"  {prompt}  ->  {answer!r}")


def argument_parser(description: str, voices: Mapping[str, Voice]) -> argparse.ArgumentParser:
    """The options that all the scripts have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--only", choices=list(voices), action="append", help="train this one (repeatable)"
    )
    parser.add_argument("--steps", type=int, help="optimizer steps, instead of each voice's own")
    parser.add_argument("--out", type=Path, default=ADAPTERS)
    return parser


def run(base: Base, voices: Mapping[str, Voice], arguments: argparse.Namespace) -> None:
    """Train and save the voices asked for, then answer from the saved files."""
    names = arguments.only or list(voices)
    for name in names:
        voice = voices[name]
        if arguments.steps is not None:
            voice = replace(voice, steps=arguments.steps)
        train_voice(base, name, voice, arguments.out / name)
    show_answers("base", base.load(), base.tokenizer)
    for name in names:
        model = voices[name].method.load(base.load(), arguments.out / name)
        show_answers(name, model, base.tokenizer)
