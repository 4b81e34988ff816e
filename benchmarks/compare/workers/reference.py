"""The judge: transformers and PEFT in float32, which say how far from greedy an answer is."""

from collections.abc import Sequence
from itertools import groupby

import torch
from transformers import AutoModelForCausalLM

from .hugging_face import activated, with_adapters
from .loop import Question, serve


class Reference:
    """The base and all adapters, their bfloat16 numbers widened to float32."""

    def start(self, question: Question) -> dict[str, object]:
        """Load them."""
        torch.set_num_threads(question["threads"])
        model = AutoModelForCausalLM.from_pretrained(question["base"], dtype=torch.bfloat16)
        self._model = with_adapters(model, question["adapters"]).float().eval()
        # A system that is told to go on after the end token may take the next best one instead.
        self._end = model.config.eos_token_id
        return {}

    @torch.inference_mode()
    def gaps(self, question: Question) -> list[list[float]]:
        """Of every token of every answer: log-probability of the best token less its own.

        Rows are {"model", "prompt", "answer"}; rows of a model that follow each other are computed
        together if their lengths are equal.
        """
        rows = question["rows"]
        batches = [list(batch) for _, batch in groupby(rows, _alike)]
        return [gaps for batch in batches for gaps in self._batch(batch)]

    def _batch(self, rows: Sequence[Question]) -> list[list[float]]:
        prompt, answer = len(rows[0]["prompt"]), len(rows[0]["answer"])
        tokens = torch.tensor([row["prompt"] + row["answer"] for row in rows])
        with activated(self._model, rows[0]["model"]):
            # The last token predicts nothing that is asked for.
            logits = self._model(input_ids=tokens[:, :-1], logits_to_keep=answer).logits
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(2, tokens[:, prompt:, None])[..., 0]
        best = logprobs.amax(-1)
        if self._end is not None:
            logprobs[..., self._end] = -torch.inf
            best = torch.where(tokens[:, prompt:] == self._end, best, logprobs.amax(-1))
        return [[round(gap, 4) for gap in row] for row in (best - chosen).tolist()]


def _alike(row: Question) -> tuple[str, int, int]:
    return row["model"], len(row["prompt"]), len(row["answer"])


if __name__ == "__main__":
    reference = Reference()
    serve({"start": reference.start, "gaps": reference.gaps})
