"""A real server on a tiny model that knows tools, for clients and fuzzers to ask."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from peft import LoraConfig

from ..tiny_models import make_tiny, make_tokenizer
from .peft_oracle import Oracle
from .running import RunningServer, running_server

BASE, ADAPTERS = "base", ("red", "blue")
HERMES_TEMPLATE = """
{%- if tools %}<|im_start|>system
# Tools
<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools>
Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def make_model(folder: Path) -> Path:
    """A tiny random model that writes calls when it must: nobody taught it."""
    make_tiny("llama", folder, max_position_embeddings=4096)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = HERMES_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def served(
    folder: Path, *options: str, adapters: Sequence[str] = ADAPTERS
) -> Iterator[RunningServer]:
    """The model and LoRAs that change its mind, served from files in ``folder``."""
    model = make_model(folder / "model")
    chosen = ["--served-model-name", BASE, "--memory-budget", "16MiB", "--dtype", "float32"]
    for option in make_adapters(model, folder, adapters):
        chosen += ["--adapter", option]
    log = folder / "log"
    with running_server(model, *chosen, *options, log=log, OMP_NUM_THREADS="1") as running:
        yield running


def make_adapters(model: Path, folder: Path, names: Sequence[str]) -> list[str]:
    """A random LoRA for each name, as ``--adapter`` takes it."""
    oracle = Oracle(model)
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    return [
        f"{name}={oracle.save_adapter(config, folder / name, seed, size=0.5)}"
        for seed, name in enumerate(names)
    ]
