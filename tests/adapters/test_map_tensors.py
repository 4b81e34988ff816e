"""A whole adapter with other tensors: each object once, and nothing else of it changed."""

import pytest
import torch

from deltamux.adapters.lower import lower
from deltamux.server.model.base import load_base

from ..kinds import goldens

FOLDERS = {
    golden.name: golden.folder
    for golden in goldens("llama")
    if golden.name in ("mam", "vera", "compacter")
}


@pytest.mark.parametrize("name", FOLDERS)
def test_every_tensor_is_changed_once_and_shared_as_before(name, tiny_model):
    adapter = lower(FOLDERS[name], load_base(tiny_model("llama"), torch.float32), 1 << 30)
    seen = []

    def change(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor)
        return tensor + 1

    changed = adapter.map_tensors(change)
    stored = list(adapter.tensors) + list(adapter.prefix.tensors if adapter.prefix else ())
    assert {id(tensor) for tensor in seen} == {id(tensor) for tensor in stored}
    assert len(seen) == len(stored)
    for before, after in zip(adapter.tensors, changed.tensors, strict=True):
        assert torch.equal(after, before + 1)
    assert changed.num_device_bytes == adapter.num_device_bytes
    assert changed.digest == adapter.digest
    assert [part.scope for part in changed.parts] == [part.scope for part in adapter.parts]
    assert len(changed.primitives) == len(adapter.primitives)
