"""Multitask prompt tuning (arXiv:2303.02861) as PEFT stores and computes it; see ``soft_prompt``.

    e = prompt_embeddings * (prefix_task_cols[t] prefix_task_rows[t])

for the task t that is served. PEFT takes it from each call; here ``deltamux.json`` names it, and
the same files serve another task from another folder.
"""

from collections.abc import Mapping

from torch import Tensor

from ..checkpoint import Checkpoint
from ..errors import AdapterCorrupt, AdapterUnsupported, shown
from ..files import OPTIONS_FILE
from ..formats.config_fields import positive_int
from ..formats.linear_adapter import PeftKind, bounded_rank, require_shape
from ..formats.soft_prompt import (
    MAX_PROMPT,
    PROMPT_HARMLESS,
    Prompt,
    SoftPrompt,
    prompt_rules,
    require_width,
)
from ..kind import KindPage

_COLUMNS, _ROWS, _TASK = "prefix_task_cols", "prefix_task_rows", "task_id"


def _read(checkpoint: Checkpoint) -> SoftPrompt:
    prompt = Prompt.read(checkpoint, (_COLUMNS, _ROWS))
    require_width(checkpoint.config, prompt.rows)
    tasks = positive_int("num_tasks", checkpoint.config.get("num_tasks", 1))
    rank = bounded_rank("num_ranks", checkpoint.config.get("num_ranks", 1))
    length, width = prompt.rows.shape
    columns, rows = prompt.others[_COLUMNS], prompt.others[_ROWS]
    require_shape("the prompt", _COLUMNS, columns, tasks, length, rank)
    require_shape("the prompt", _ROWS, rows, tasks, rank, width)
    task = _task(checkpoint.options, tasks)
    return SoftPrompt(_of_task(prompt.rows, columns[task], rows[task]), prompt.replaced)


def _of_task(shared: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    return shared.float() * (columns.float() @ rows.float())


def _task(options: Mapping[str, object], tasks: int) -> int:
    if _TASK not in options:
        if tasks == 1:
            return 0
        raise AdapterUnsupported(
            f"the prompt is of {tasks} tasks: say which one to serve with "
            f'{{"{_TASK}": 0}} in {OPTIONS_FILE}'
        )
    task = options[_TASK]
    if type(task) is not int or not 0 <= task < tasks:
        raise AdapterCorrupt(
            f"{OPTIONS_FILE}: {_TASK!r} is {shown(task)}, and the prompt has {tasks} tasks from 0"
        )
    return task


KIND = PeftKind(
    name="multitask_prompt_tuning",
    page=KindPage(
        title="Multitask prompt tuning (arXiv:2303.02861)",
        family="addition",
        files="prompt_embeddings (P, hidden), prefix_task_cols (tasks, P, r), prefix_task_rows "
        "(tasks, r, hidden); fields num_tasks, num_ranks",
        equation="rows e = prompt_embeddings * (prefix_task_cols[t] prefix_task_rows[t]) stand "
        "before the embedded tokens; token i has position P + i",
        primitives=("KVPrefix",),
        memory="2 layers kv_heads head_dim P numbers, in blocks of the KV cache that all requests "
        "share; computed once when the adapter is loaded",
        limits=f"One task an adapter. P is at most {MAX_PROMPT} and below the base's longest "
        "sequence. modules_to_save may hold the last norm and the head, which the prompt does not "
        "pass.",
        options={_TASK: "t, the task to serve, from 0; needed where there are several"},
    ),
    rules=prompt_rules(
        {
            **PROMPT_HARMLESS,
            "prompt_tuning_init": "initialization only",
            "prompt_tuning_init_text": "initialization only",
            "prompt_tuning_init_state_dict_path": "initialization only",
            "prompt_tuning_init_task": "initialization only",
            "tokenizer_name_or_path": "initialization only",
            "tokenizer_kwargs": "initialization only",
        },
        ("num_tasks", "num_ranks"),
    ),
    read=_read,
)
