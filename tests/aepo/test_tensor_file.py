"""Tensors in a file: as the library reads them, every one aligned to its own type."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aepo.files.tensors import DTYPES, write_tensors


def test_every_type_is_read_back_and_aligned(tmp_path: Path) -> None:
    path = tmp_path / "file"
    tensors = {str(dtype): torch.arange(3).to(dtype) for dtype in sorted(DTYPES, key=str)}
    digest = write_tensors(path, tensors.items, finite=())
    data = path.read_bytes()
    assert digest == hashlib.sha256(data).hexdigest()
    size = int.from_bytes(data[:8], "little")
    assert size % 8 == 0, "the data begin at a multiple of 8, too"
    header = json.loads(data[8 : 8 + size])
    assert not [name for name, entry in header.items() if entry["data_offsets"][0] % tensors[name].element_size()]
    read = load_file(path)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    """Somebody may have mapped it: vLLM reads the weights of an update from one."""
    path = tmp_path / "file"
    path.write_text("there")
    with pytest.raises(FileExistsError):
        write_tensors(path, {"a": torch.ones(1)}.items, finite=())
    assert path.read_text() == "there"
