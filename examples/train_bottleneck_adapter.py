"""Train the demo's bottleneck adapter (Pfeiffer's, arXiv:2005.00247) with AdapterHub.

AdapterHub needs transformers 4, and the server transformers 5: this script has an environment of
its own, and is told where the server's copy of the demo base is, which the first ``make serve`` has
made. A run takes minutes on a CPU:

    python3 -m venv .venv/adapterhub
    .venv/adapterhub/bin/pip install torch==2.13.0 transformers==4.57.6 adapters==1.3.0
    .venv/adapterhub/bin/python examples/train_bottleneck_adapter.py \\
        ~/.local/state/deltamux/models/SmolLM2-135M-Instruct.*
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import voices
from training import BASE_ID, Base, Voice, argument_parser, run
from transformers import (
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import adapters
from adapters import AdapterConfig, SeqBnConfig

NAME = "voice"


@dataclass(frozen=True)
class AdapterHub:
    """A method of AdapterHub, initialized as AdapterHub does it."""

    config: AdapterConfig

    def attach(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """See ``training.Method``."""
        del tokenizer
        adapters.init(base)
        base.add_adapter(NAME, config=self.config)
        base.train_adapter(NAME)
        return base

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Write adapter_config.json and adapter.safetensors, and no copy of the base's head."""
        model.config.name_or_path = BASE_ID
        model.save_adapter(str(folder), NAME, with_head=False, use_safetensors=True)

    def load(self, base: PreTrainedModel, folder: Path) -> PreTrainedModel:
        """See ``training.Method``."""
        adapters.init(base)
        base.load_adapter(str(folder), set_active=True, with_head=False, use_safetensors=True)
        # AdapterHub 1.3.0 does not hand transformers 4.57's cache to the attention of Llama.
        base.generation_config.use_cache = False
        return base


VOICES = {
    "robot": Voice(
        voices.robot,
        AdapterHub(SeqBnConfig(reduction_factor=36, leave_out=list(range(8)))),
    ),
}


def load_base(folder: Path) -> PreTrainedModel:
    """The base; transformers 4 knows RoPE's theta by another name than the server's copy gives."""
    config = json.loads((folder / "config.json").read_text())
    theta = config["rope_parameters"]["rope_theta"]
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, rope_theta=theta)


def main() -> None:
    """Parse the command line and train."""
    parser = argument_parser("Train the demo's bottleneck adapter.", VOICES)
    parser.add_argument("base", type=Path, help="the folder of the demo base")
    arguments = parser.parse_args()
    base = Base(
        load=partial(load_base, arguments.base),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(arguments.base),
    )
    run(base, VOICES, arguments)


if __name__ == "__main__":
    main()
