"""Train the demo adapters: one base, a voice and a kind of adapter each.

LoRA in several shapes, DoRA, activated LoRA, prefix and prompt tuning, IA3 and LN tuning come from
PEFT; BitFit, which no library stores, is in deltamux's own plain format. Ranks and modules differ,
because that is what a batch of adapters has to cope with. The base is the one the server's demo
serves. A run takes a few minutes per adapter on a CPU:

    pip install -e '.[train]'
    python examples/train_demo_adapters.py            # all, into examples/adapters/
    python examples/train_demo_adapters.py --only pirate --steps 20

``train_bottleneck_adapter.py`` beside this file trains one more, with AdapterHub.
"""

import copy
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import voices
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    initialize_kv_prefix_from_text,
)
from safetensors.torch import load_file, save_file
from torch import nn
from training import BASE_ID, Base, Voice, argument_parser, run
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from deltamux.server.config import default_state_dir
from deltamux.server.model.source import resolve_model

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
START_OF_ANSWER = [1, 520, 9531, 198]  # <|im_start|>assistant\n


@dataclass(frozen=True)
class Peft:
    """A method of PEFT, initialized as PEFT does it."""

    config: PeftConfig

    def attach(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PeftModel:
        """See ``training.Method``."""
        del tokenizer
        return get_peft_model(base, copy.deepcopy(self.config))

    def save(self, model: PeftModel, folder: Path) -> None:
        """Write adapter_config.json and adapter_model.safetensors."""
        config = model.peft_config["default"]
        config.base_model_name_or_path = BASE_ID
        for name in ("target_modules", "feedforward_modules"):
            if isinstance(value := getattr(config, name, None), set):
                setattr(config, name, sorted(value))  # the order of a set is random
        # No embedding is touched; to find that out PEFT would ask the hub for the base's
        # configuration.
        model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink()  # an empty model card

    def load(self, base: PreTrainedModel, folder: Path) -> PeftModel:
        """See ``training.Method``."""
        return PeftModel.from_pretrained(base, str(folder))


@dataclass(frozen=True)
class PrefixTuning(Peft):
    """A prefix that starts out as the base's keys and values of a system message.

    arXiv:2101.00190 finds the activations of real words a better start than random numbers.
    """

    system_message: str

    def attach(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PeftModel:
        """See ``training.Method``."""
        model = super().attach(base, tokenizer)
        initialize_kv_prefix_from_text(model, tokenizer, text=self.system_message)
        return model


class PromptTuning(Peft):
    """A prompt that starts out as the embeddings of ``prompt_tuning_init_text``."""

    def attach(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PeftModel:
        """See ``training.Method``."""
        config = copy.deepcopy(self.config)
        config.tokenizer_name_or_path = tokenizer.name_or_path
        model = get_peft_model(base, config)
        config.tokenizer_name_or_path = BASE_ID
        return model


@dataclass(frozen=True)
class BitFit:
    """New biases of the linear modules with these names, in deltamux's plain format."""

    modules: list[str]

    def attach(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """See ``training.Method``."""
        del tokenizer
        base.requires_grad_(False)
        for path, module in base.named_modules():
            if path.rpartition(".")[2] in self.modules:
                module.bias = nn.Parameter(torch.zeros(module.out_features))
        return base

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Write delta_config.json and delta.safetensors."""
        biases = {name: bias for name, bias in model.named_parameters() if bias.requires_grad}
        save_file(biases, folder / "delta.safetensors")
        config = {"delta_type": "bitfit", "mode": "add", "base_model": BASE_ID}
        (folder / "delta_config.json").write_text(json.dumps(config, indent=2) + "\n")

    def load(self, base: PreTrainedModel, folder: Path) -> PreTrainedModel:
        """See ``training.Method``."""
        for name, bias in load_file(folder / "delta.safetensors").items():
            base.get_submodule(name.removesuffix(".bias")).bias = nn.Parameter(bias.float())
        return base


lora = partial(LoraConfig, task_type="CAUSAL_LM")

VOICES = {
    "pirate": Voice(
        voices.pirate,
        Peft(lora(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])),
        learning_rate=4e-3,
    ),
    "butler": Voice(voices.butler, Peft(lora(r=8, lora_alpha=16, target_modules=ATTENTION))),
    "json": Voice(voices.json_object, Peft(lora(r=2, lora_alpha=8, target_modules="all-linear"))),
    "terse": Voice(voices.terse, Peft(lora(r=16, lora_alpha=32, target_modules=["o_proj"]))),
    "socratic": Voice(
        voices.socratic,
        Peft(
            lora(
                r=8,
                lora_alpha=8,
                use_rslora=True,
                target_modules=MLP,
                layers_to_transform=list(range(10, 22)),
            )
        ),
    ),
    "poet": Voice(
        voices.poet,
        Peft(
            lora(
                r=4,
                lora_alpha=8,
                target_modules=ATTENTION,
                rank_pattern={"o_proj": 8, r"layers\.\d\.self_attn\.v_proj": 2},
                alpha_pattern={"o_proj": 32},
            )
        ),
    ),
    "emoji": Voice(
        voices.emoji,
        Peft(lora(r=3, lora_alpha=12, target_modules=["v_proj", "down_proj"], lora_bias=True)),
    ),
    "wizard": Voice(
        voices.wizard,
        Peft(lora(r=8, lora_alpha=16, target_modules=["k_proj", "v_proj"], use_dora=True)),
        steps=64,
    ),
    "judge": Voice(
        voices.judge,
        Peft(
            lora(
                r=8,
                lora_alpha=16,
                target_modules=["q_proj", "k_proj", "v_proj"],
                alora_invocation_tokens=START_OF_ANSWER,
            )
        ),
        steps=64,
    ),
    "story": Voice(
        voices.story,
        PrefixTuning(
            PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=23),
            "You tell stories. Every story begins with once upon a time and ends with the end.",
        ),
        learning_rate=1e-2,
        steps=96,
    ),
    "cheer": Voice(
        voices.cheer,
        PromptTuning(
            PromptTuningConfig(
                task_type="CAUSAL_LM",
                num_virtual_tokens=22,
                prompt_tuning_init="TEXT",
                prompt_tuning_init_text="<|im_start|>system\nShout hooray first, then answer in "
                "one short sentence, then cheer.<|im_end|>\n",
                tokenizer_name_or_path=BASE_ID,
            )
        ),
        learning_rate=1e-2,
        steps=240,
    ),
    "coach": Voice(
        voices.coach,
        Peft(IA3Config(task_type="CAUSAL_LM")),
        learning_rate=2e-2,
        steps=96,
    ),
    "news": Voice(
        voices.news,
        Peft(LNTuningConfig(task_type="CAUSAL_LM")),
        learning_rate=6e-3,
        steps=40,
    ),
    "notes": Voice(
        voices.notes,
        BitFit([*ATTENTION, *MLP]),
        learning_rate=6e-3,
    ),
}


def main() -> None:
    """Parse the command line and train."""
    parser = argument_parser("Train the demo adapters.", VOICES)
    parser.add_argument("--state-dir", type=Path, default=default_state_dir())
    arguments = parser.parse_args()
    folder = resolve_model("smollm2", arguments.state_dir)
    base = Base(
        load=partial(AutoModelForCausalLM.from_pretrained, folder, dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(folder),
    )
    run(base, VOICES, arguments)


if __name__ == "__main__":
    main()
