"""What a server says, before it is believed, and in what words it reaches people. No server is needed for that."""

import os
import re

import pytest

pytest.importorskip("httpx")

from aepo.rollout.engines.vllm import answers as vllm_answers
from aepo.rollout.engines.vllm.answers import WORDS, checking, one_line, quoted, shared_directory, weight_version
from aepo.rollout.engines.vllm.replica import ReplicaError, finish_reason

STEERS = "x\x1b[31m\r\n\x07\u202e\udc80"  # colours, lines, a bell, right-to-left, half of a pair


def nested(depth: int) -> list:
    return [nested(depth - 1)] * 7 if depth else ["y" * 99] * 7


@pytest.mark.parametrize("value", [STEERS, STEERS * 10**5, 10**4000, nested(6), {STEERS * 9: nested(3)}, [STEERS] * 99])
def test_words_of_a_server_are_one_short_line(value):
    for text in (quoted(value), one_line(str(value))):
        assert len(text) <= WORDS
        assert text.isprintable()


def test_what_is_short_and_plain_stays():
    assert one_line("two\n  lines") == "two lines"
    assert quoted("raw_logprobs") == "'raw_logprobs'"
    assert quoted([1, None, "a"]) == "[1, None, 'a']"


def test_a_reason_that_is_long():
    with pytest.raises(RuntimeError, match="finish_reason = 'x") as failure:
        finish_reason(STEERS * 10**5, None)
    assert len(str(failure.value)) < WORDS
    assert str(failure.value).isprintable()


def test_a_weight_version_is_short_and_printable():
    assert weight_version({"weight_version": "17@0123456789ab"}) == "17@0123456789ab"
    for wrong in (STEERS, "v" * 101, "line\n"):
        with pytest.raises(ValueError, match="expected at most 100 printable characters") as failure:
            weight_version({"weight_version": wrong})
        assert str(failure.value).isprintable()
        assert len(str(failure.value)) < 2 * WORDS


def test_a_directory_of_a_server_is_one_that_exists_here(tmp_path):
    assert shared_directory(str(tmp_path)) == str(tmp_path)
    assert shared_directory(f"{tmp_path}/") == f"{tmp_path}/"
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    assert shared_directory(f"{tmp_path}/link") == f"{tmp_path}/link", "a mount may be reached by one"
    before = sorted(tmp_path.rglob("*"))
    assert [path.name for path in before] == ["file", "link"]


def test_a_directory_is_tried_and_nothing_in_it_is_removed(tmp_path):
    """A server's word is no reason to clear up somewhere."""
    left = tmp_path / "aepo-weights-0123456789ab-abcdefgh"
    left.mkdir()
    (left / "lock").touch()
    os.utime(left, (1e9, 1e9))
    shared_directory(str(tmp_path))
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == [left.name, "lock"]


WRONG = ["", ".", "~", "/", "//", "///", "relative/dir", "/proc", "/proc/x", "/dev/null", "/etc/passwd", "\0", "/\0"]
BELOW = [
    "new",
    "new/er",
    "..",
    "../x",
    "./x",
    "file",
    "file/x",
    "a//b",
    "\x1b[31m",
    "\udc80",
    "x" * 5000,
    "x" * 500_000,
]


@pytest.mark.parametrize("path", [*WRONG, *(f"TMP/{name}" for name in BELOW)], ids=lambda path: ascii(path)[:30])
def test_no_other_directory_is_taken_and_none_is_made(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "\x1b[31m").mkdir()
    before, above = sorted(os.listdir(tmp_path)), sorted(os.listdir(tmp_path.parent))
    with (
        pytest.raises(
            ReplicaError, match=r"^http://s: /aepo/status answered .*'weights_dir' is '.*expected the"
        ) as failure,
        checking("http://s", "/aepo/status"),
    ):
        shared_directory(path.replace("TMP", str(tmp_path)))
    assert str(failure.value).isprintable()
    assert len(str(failure.value)) < 2 * WORDS
    assert (sorted(os.listdir(tmp_path)), sorted(os.listdir(tmp_path.parent))) == (before, above)


def test_a_directory_in_which_nothing_can_be_made(tmp_path, monkeypatch):
    """Rights would not do: root has all of them."""

    def refuse(parent):
        raise PermissionError(13, "Permission denied", str(parent))

    monkeypatch.setattr(vllm_answers, "update_directory", refuse)
    with pytest.raises(ValueError, match=re.escape("(Permission denied), expected the absolute path")):
        shared_directory(str(tmp_path))


def test_a_status_says_where_weights_go_or_why_not():
    answer = {"vocab_size": 9, "max_model_len": 9, "logprobs_mode": "x", "weights_dir": None, "no_weights": None}
    answer["weight_version"] = "default"
    with pytest.raises(ValueError, match="'weights_dir' and 'no_weights' are null"):
        vllm_answers.status(answer)
    assert vllm_answers.status({**answer, "no_weights": "why"})
