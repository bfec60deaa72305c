"""Files that are written whole: on the disk before they have their name, also where the path is no file."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from disk_toys import recorded

from aepo.run.files import append_lines, refuse_unwritable, write_file


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


def test_a_file_has_its_name_once_its_content_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = recorded(monkeypatch)
    write_file(tmp_path / "run.json", "{}")
    assert events == ["flush .run.json.writing 2", "rename .run.json.writing run.json"]


def test_lines_are_flushed_where_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = recorded(monkeypatch)
    append_lines(tmp_path / "evals.jsonl", "", flush=True)
    append_lines(tmp_path / "evals.jsonl", "{}\n")
    assert events == []
    append_lines(tmp_path / "evals.jsonl", "", flush=True)  # those that were there
    append_lines(tmp_path / "evals.jsonl", "{}\n", flush=True)
    assert events == ["flush evals.jsonl 3", "flush evals.jsonl 6"]
    assert (tmp_path / "evals.jsonl").read_text() == "{}\n{}\n"
