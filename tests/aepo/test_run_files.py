"""Files that are written whole, where the path is something else than a file."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from aepo.run_files import refuse_unwritable, write_file


def test_a_link_stays_a_link_and_its_file_is_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for target in ("folder/there", "folder/new"):
        link = tmp_path / "link"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        refuse_unwritable("--json", link)
        write_file(link, target)
        assert link.is_symlink()
        assert (tmp_path / target).read_text() == target
    assert sorted(os.listdir(tmp_path / "folder")) == ["new", "there"]


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    """/dev/null as root is the same case."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    refuse_unwritable("--json", pipe)
    write_file(pipe, "{}")
    assert os.read(reading, 9) == b"{}"
    os.close(reading)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


@pytest.mark.parametrize("name", ["", "missing/x", "file/x", "x" * 300, "loop", "a\0b"])
def test_what_cannot_be_written_is_said_before(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match=r"^--json .*: expected a file that can be written: ") as raised:
        refuse_unwritable("--json", tmp_path / name)
    assert "\n" not in str(raised.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"]
