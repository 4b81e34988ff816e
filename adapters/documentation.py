"""``docs/adapters.md``, written from the kinds themselves: ``make docs``."""

import sys
from collections.abc import Iterator

from .kind import AdapterKind
from .lower import REFUSED_PEFT_TYPES, all_kinds

_LIBRARIES = {
    "peft": ("PEFT", "folders of `save_pretrained` (PEFT 0.21.2)"),
    "adapterhub": ("AdapterHub", "folders of `save_adapter` (`adapters` 1.3.0)"),
    "plain": ("plain", "`delta_config.json` and `delta.safetensors`"),
}

_INTRODUCTION = """\
# Adapter kinds

Written by `make docs` from the kinds in `adapters/kinds/`; change it there.

An adapter is a folder. What it is follows from its configuration, which modules it changes from the
names of its tensors. When it is loaded it is *lowered* to primitives, corrections at places of the
base that the engine computes beside it, and any request of a batch may use any of them. Every field
of a configuration is implemented, harmless for a stated reason, or refused by name; `deltamux
inspect PATH` tells what a folder is, or why it is refused.

A file `deltamux.json` in the folder holds what a library does not save and serving needs to know;
the options of each kind are listed below, and an unknown one is refused.
"""


def document() -> str:
    """The page, in Markdown."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield _INTRODUCTION
    kinds = all_kinds()
    yield "| kind | library | primitives |"
    yield "|---|---|---|"
    for kind in kinds:
        yield (
            f"| [{kind.name}](#{_anchor(kind)}) | {_LIBRARIES[kind.library][0]} "
            f"| {', '.join(kind.page.primitives)} |"
        )
    for library, (name, files) in _LIBRARIES.items():
        yield f"\n# {name}: {files}"
        for kind in kinds:
            if kind.library == library:
                yield from _section(kind)
    yield "\n# Refused by name\n"
    for peft_type, reason in REFUSED_PEFT_TYPES.items():
        yield f"- PEFT `{peft_type}`: {reason}"


def _section(kind: AdapterKind) -> Iterator[str]:
    page = kind.page
    yield f"\n## {_heading(kind)}\n"
    yield f"{page.title}; {page.family}."
    yield f"\n- **Files**: {page.files}"
    yield f"- **Computes**: {page.equation}"
    yield f"- **Primitives**: {', '.join(page.primitives)}"
    yield f"- **Memory**: {page.memory}"
    yield f"- **Limits**: {page.limits}"
    for option, meaning in page.options.items():
        yield f"- **Option** `{option}`: {meaning}"


def _heading(kind: AdapterKind) -> str:
    return f"{kind.name} ({kind.library})"


def _anchor(kind: AdapterKind) -> str:
    """As GitHub makes it from the heading."""
    return f"{kind.name}-{kind.library}"


if __name__ == "__main__":
    sys.stdout.write(document() + "\n")
