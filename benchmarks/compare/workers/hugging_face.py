"""transformers' ``generate``, and PEFT's over it: a static batch at a time.

``adapters_by`` chooses how PEFT serves a batch: "names" gives every row its adapter in one call
(``adapter_names``), "turns" makes one adapter active after the other, each with its own rows;
"none" leaves PEFT out.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from .loop import Clock, Question, in_waves, serve

BASE = "base"


class _Arrivals(StoppingCriteria):  # type: ignore[misc]  # transformers has no types
    """Stops nothing; notes when each token of the batch was there."""

    def __init__(self, now: Clock) -> None:
        self.times: list[float] = []
        self._now = now

    def __call__(self, input_ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        self.times.append(self._now())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Generator:
    """A loaded model."""

    def start(self, question: Question) -> dict[str, object]:
        """Load the base, and the adapters if they are asked for."""
        torch.set_num_threads(question["threads"])
        self._by = question["adapters_by"]
        model = AutoModelForCausalLM.from_pretrained(question["base"], dtype=torch.bfloat16)
        if self._by != "none":
            model = with_adapters(model, question["adapters"])
        self._model = model.eval()
        # So that answers have the length that is asked for.
        self._model.generation_config.eos_token_id = None
        return {}

    def run(self, question: Question) -> dict[str, object]:
        """Requests in waves."""
        return in_waves(question, self._wave)

    @torch.inference_mode()
    def _wave(self, requests: Sequence[Question], now: Clock) -> list[dict[str, Any]]:
        sent, records = now(), {}
        for rows in self._batches(requests):
            times, answers = self._generate([requests[row] for row in rows], now)
            for row, token_ids in zip(rows, answers, strict=True):
                records[row] = {
                    "sent": sent,
                    "times": times,
                    "tokens": [1] * len(times),
                    "token_ids": token_ids,
                }
        return [records[row] for row in range(len(requests))]

    def _batches(self, requests: Sequence[Question]) -> list[list[int]]:
        """Rows that are computed together."""
        if self._by != "turns":
            return [list(range(len(requests)))]
        batches: dict[str, list[int]] = {}
        for row, request in enumerate(requests):
            batches.setdefault(request["model"], []).append(row)
        return list(batches.values())

    def _generate(
        self, requests: Sequence[Question], now: Clock
    ) -> tuple[list[float], list[list[int]]]:
        prompts = torch.tensor([each["prompt"] for each in requests])
        arrivals, model = _Arrivals(now), requests[0]["model"]
        names = {"adapter_names": [_peft_name(each["model"]) for each in requests]}
        with activated(self._model, model) if self._by == "turns" else nullcontext():
            tokens = self._model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                max_new_tokens=requests[0]["output_tokens"],
                stopping_criteria=StoppingCriteriaList([arrivals]),
                **(names if self._by == "names" else {}),
            )
        return arrivals.times, tokens[:, prompts.shape[1] :].tolist()


def with_adapters(model: Any, adapters: Question) -> Any:
    """The model with all adapters, in the types they are stored in."""
    names = list(adapters)
    wrapped = PeftModel.from_pretrained(
        model, adapters[names[0]], adapter_name=names[0], autocast_adapter_dtype=False
    )
    for name in names[1:]:
        wrapped.load_adapter(adapters[name], adapter_name=name, autocast_adapter_dtype=False)
    return wrapped


def activated(model: Any, name: str) -> Any:
    """A context in which one adapter, or none for the base, is active."""
    if name == BASE:
        return model.disable_adapter()
    model.set_adapter(name)
    return nullcontext()


def _peft_name(model: str) -> str:
    return "__base__" if model == BASE else model


if __name__ == "__main__":
    generator = Generator()
    serve({"start": generator.start, "run": generator.run})
