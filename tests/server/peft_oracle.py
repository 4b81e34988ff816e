"""Random PEFT adapters on disk, and what transformers and PEFT themselves generate."""

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


@dataclass(frozen=True)
class Generation:
    token_ids: list[int]
    logprobs: list[float]


class Oracle:
    """One transformers model on which adapters are put, one at a time."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32):
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager"
        ).eval()

    def save_adapter(self, config: LoraConfig, folder: Path, seed: int, size: float = 0.02) -> Path:
        """A random adapter with this configuration, saved by PEFT."""
        torch.manual_seed(seed)
        wrapped = get_peft_model(self.model, config)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=size)
        wrapped.save_pretrained(folder)
        self.model = wrapped.unload()
        return folder

    def generate(
        self, prompt: list[int], max_tokens: int, adapter: Path | None = None
    ) -> Generation:
        """Greedy tokens and their log-probabilities, this request alone, the end token ignored."""
        with self._with(adapter) as model:
            return self._generate(model, prompt, max_tokens)

    def prompt_logprobs(self, prompt: list[int], adapter: Path | None = None) -> torch.Tensor:
        """Log-probabilities (len(prompt) - 1,) of every prompt token but the first."""
        with self._with(adapter) as model, torch.inference_mode():
            rows = model(input_ids=torch.tensor([prompt])).logits[0, :-1].float().log_softmax(-1)
            return rows.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]

    @contextmanager
    def _with(self, adapter: Path | None):
        if adapter is None:
            yield self.model
            return
        wrapped = PeftModel.from_pretrained(self.model, adapter).eval()
        try:
            yield wrapped
        finally:
            self.model = wrapped.unload()

    @staticmethod
    @torch.inference_mode()
    def _generate(model, prompt: list[int], max_tokens: int) -> Generation:
        token_ids, logprobs, cache = [], [], None
        inputs = torch.tensor([prompt])
        for _ in range(max_tokens):
            out = model(input_ids=inputs, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            row = out.logits[0, -1].float().log_softmax(-1)
            token = int(row.argmax())
            token_ids.append(token)
            logprobs.append(float(row[token]))
            inputs = torch.tensor([[token]])
        return Generation(token_ids, logprobs)
