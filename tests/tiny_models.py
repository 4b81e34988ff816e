"""Tiny random checkpoints of every supported family, made by transformers: the oracle's own files.

Every parameter is drawn, biases and norms included, so that a forgotten one shows in the logits.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 300
EOS_TOKEN = "<|im_end|>"
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", EOS_TOKEN]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "the quick brown fox jumps over the lazy dog and the other dogs that are there",
    "she sells sea shells on the sea shore while the weather is neither cold nor warm",
    "Answer: one, two, three, four. Question: what is the name of the thing in the house?",
]

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": SPECIAL_TOKENS.index(EOS_TOKEN),
    "attn_implementation": "eager",
}
GPT2_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 0,
    "eos_token_id": SPECIAL_TOKENS.index(EOS_TOKEN),
    "attn_implementation": "eager",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {**SIZES, "tie_word_embeddings": False}),
    "llama3": (
        LlamaConfig,
        {**SIZES, "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    ),
    "mistral": (MistralConfig, {**SIZES, "sliding_window": 16}),
    "qwen2": (Qwen2Config, {**SIZES, "tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {**SIZES, "head_dim": 32, "tie_word_embeddings": True}),
    "gpt2": (GPT2Config, GPT2_SIZES),
}


def make_tiny(
    family: str, folder: Path, *, seed: int = 0, max_shard_size: str = "5GB", **overrides: Any
) -> Path:
    """Write a float32 checkpoint with tokenizer to ``folder`` and return it.

    Args:
        family: A key of ``FAMILIES``.
        folder: Created if need be.
        seed: Of the weights.
        max_shard_size: As of ``save_pretrained``; ``"50KB"`` gives several shards.
        overrides: Fields of the family's transformers configuration.
    """
    config_class, defaults = FAMILIES[family]
    config = config_class(**{**defaults, **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _draw_parameters(model, seed)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id
    )
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``VOCAB_SIZE`` tokens, so that any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL_TOKENS[0],
        eos_token=EOS_TOKEN,
        pad_token=SPECIAL_TOKENS[0],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _draw_parameters(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():  # tied ones come once
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.ndim == 1 and bool((parameter == 1).all())
            scale = 0.125 if parameter.ndim > 1 else 0.1
            parameter.copy_(noise * scale + (1.0 if is_norm else 0.0))
