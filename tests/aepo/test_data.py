"""Questions from files of each kind, and what is said about those that cannot be used."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from aepo.agents.tasks.files import FilesTask, divide
from aepo.agents.tools.search import SearchTool
from aepo.types import Message, Question

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

ROWS = [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(20)]
VERL = [
    {
        "data_source": "openai/gsm8k",
        "prompt": [{"content": f"What is {i} + 1?", "role": "user"}],
        "ability": "math",
        "reward_model": {"ground_truth": str(i + 1), "style": "rule"},
        "extra_info": {"answer": "steps", "index": i, "split": "train"},
    }
    for i in range(4)
]


def jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def saved(path: Path, rows: list[dict[str, Any]], parts: int = 1) -> Path:
    """What `datasets` 5 writes with save_to_disk."""
    path.mkdir(parents=True)
    files = []
    for part in range(parts):
        name = f"data-{part:05}-of-{parts:05}.arrow"
        table = pa.Table.from_pylist(rows[part::parts])
        with pa.ipc.new_stream(path / name, table.schema) as writer:
            writer.write_table(table)
        files.append({"filename": name})
    (path / "state.json").write_text(json.dumps({"_data_files": files, "_fingerprint": "5a", "_split": None}))
    (path / "dataset_info.json").write_text("{}")
    return path


def message_of(*arguments: Any, **settings: Any) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        FilesTask(*arguments, **settings)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_json_lines(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "train.jsonl", [*ROWS[:1], "", ROWS[1], {**ROWS[2], "note": "n"}])
    held = jsonl(tmp_path / "test.jsonl", ROWS[5:7])
    task = FilesTask(str(path), str(held))
    assert task.train == [
        Question("train.jsonl:1", "0 + 1?", "1", "", {"answer": "1", "note": None}),
        Question("train.jsonl:3", "1 + 1?", "2", "", {"answer": "2", "note": None}),
        Question("train.jsonl:4", "2 + 1?", "3", "", {"answer": "3", "note": "n"}),
    ]
    assert [question.id for question in task.heldout] == ["test.jsonl:1", "test.jsonl:2"]
    assert task.identity["columns"] == {"prompt": "question", "answer": "answer", "id": None, "kind": None}


def test_rows_of_verl(tmp_path: Path) -> None:
    parquet.write_table(pa.Table.from_pylist(VERL), tmp_path / "train.parquet")
    task = FilesTask(tmp_path / "train.parquet", tmp_path / "train.parquet")
    first = task.train[0]
    assert first.prompt == ({"content": "What is 0 + 1?", "role": "user"},)
    assert (first.id, first.answer, first.kind) == ("train.parquet:1", "1", "openai/gsm8k")
    assert first.data["extra_info"] == {"answer": "steps", "index": 0, "split": "train"}
    assert "prompt" not in first.data
    assert task.identity["heldout_prompts_in_train"] == 4


def test_rows_of_trl(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Think."}
    rows = [{"prompt": [system, {"role": "user", "content": f"{i}?"}], "solution": f"${i}$", "n": i} for i in range(3)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    task = FilesTask(tmp_path / "a.parquet", tmp_path / "a.parquet")
    assert task.messages(task.train[1], chat=True) == (system, {"role": "user", "content": "1?"})
    assert task.train[1].answer == "$1$"
    assert task.train[1].data == {"solution": "$1$", "n": 1}  # reward functions ask for columns by name


def test_a_directory_that_datasets_saved(tmp_path: Path) -> None:
    saved(tmp_path / "all" / "train", VERL[:3], parts=2)
    saved(tmp_path / "all" / "test", VERL[3:])
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    task = FilesTask(tmp_path / "all")
    assert [question.id for question in task.train] == ["train:1", "train:2", "train:3"]
    assert [question.data["extra_info"]["index"] for question in task.train] == [0, 2, 1]
    assert [question.text for question in task.heldout] == ["What is 3 + 1?"]
    in_a_list = FilesTask([str(tmp_path / "all")])
    assert (in_a_list.train, in_a_list.heldout) == (task.train, task.heldout)
    only = FilesTask(tmp_path / "all" / "train", 0.4)
    assert (len(only.train), len(only.heldout)) == (2, 1)


def test_a_list_of_directories_has_the_held_out_splits_of_all(tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", 10)):
        saved(tmp_path / name / "train", ROWS[first : first + 8])
        saved(tmp_path / name / "test", ROWS[first + 8 : first + 10])
        (tmp_path / name / "dataset_dict.json").write_text("{}")
    extra = jsonl(tmp_path / "extra.jsonl", [{"question": "more?"}])
    task = FilesTask([str(tmp_path / "a"), str(extra), str(tmp_path / "b")])
    assert [question.prompt for question in task.train] == [
        *(row["question"] for row in ROWS[:8]),
        "more?",
        *(row["question"] for row in ROWS[10:18]),
    ]
    assert [question.id for question in task.heldout] == ["a/test:1", "a/test:2", "b/test:1", "b/test:2"]


def test_rows_of_many_files_are_counted_on(tmp_path: Path) -> None:
    saved(tmp_path / "all", ROWS[:8], parts=4)
    task = FilesTask(tmp_path / "all", tmp_path / "all")
    assert [question.id for question in task.train] == [f"all:{number}" for number in range(1, 9)]


def test_columns_of_one_name(tmp_path: Path) -> None:
    """Only the last one would be read."""
    texts = [pa.array(["a", "b"]), pa.array(["c", "d"])]
    parquet.write_table(pa.Table.from_arrays(texts, names=["prompt", "prompt"]), tmp_path / "a.parquet")
    assert "a.parquet: cannot be read as parquet: expected every column once, got 'prompt' twice" in message_of(
        tmp_path / "a.parquet"
    )
    struct = pa.StructArray.from_arrays(texts, names=["x", "x"])
    parquet.write_table(pa.table({"prompt": texts[0], "s": struct}), tmp_path / "b.parquet")
    assert "b.parquet: cannot be read as parquet: " in message_of(tmp_path / "b.parquet")
    path = jsonl(tmp_path / "c.jsonl", ['{"prompt": "a", "prompt": "b"}', '{"prompt": "c"}'])
    assert "c.jsonl:1: expected JSON on one line, got 'prompt' twice in one object" in message_of(path)


def test_what_the_package_datasets_writes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list(VERL)
    datasets.DatasetDict(train=rows.select([2, 0]), test=rows.select([1])).save_to_disk(tmp_path / "saved")
    task = FilesTask(tmp_path / "saved")
    assert [question.text for question in task.train] == ["What is 2 + 1?", "What is 0 + 1?"]
    assert [question.answer for question in task.heldout] == ["2"]


def test_several_files_and_patterns(tmp_path: Path) -> None:
    jsonl(tmp_path / "a" / "x.jsonl", ROWS[:2])
    jsonl(tmp_path / "b" / "x.jsonl", ROWS[2:4])
    task = FilesTask([str(tmp_path / "a" / "x.jsonl"), str(tmp_path / "b" / "x.jsonl")], 0.25)
    assert sorted(q.id for q in [*task.train, *task.heldout]) == [
        f"{folder}/x.jsonl:{line}" for folder in "ab" for line in (1, 2)
    ]
    pattern = FilesTask(str(tmp_path / "*" / "*.jsonl"), 0.25)
    assert pattern.identity == task.identity


def test_columns_by_name(tmp_path: Path) -> None:
    rows = [{"meta": {"q": f"{i}?", "n": i, "t": "easy"}, "prompt": "no", "a.b": i} for i in range(3)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    columns = {"prompt": "meta.q", "answer": "a.b", "id": "meta.n", "kind": "meta.t"}
    task = FilesTask(path, path, columns)
    assert [(q.id, q.prompt, q.answer, q.kind) for q in task.train] == [(str(i), f"{i}?", i, "easy") for i in range(3)]
    assert FilesTask(path, path, {**columns, "id": ""}).train[0].id == "a.jsonl:1"


def test_a_share_is_held_out(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [*ROWS, *ROWS[:10]])  # ten prompts twice
    task = FilesTask(path, 0.3)
    assert len(task.train) + len(task.heldout) == 30
    assert 7 <= len(task.heldout) <= 9
    assert not {q.prompt for q in task.train} & {q.prompt for q in task.heldout}
    assert FilesTask(path, 0.3).heldout == task.heldout
    assert FilesTask(path, 0.3, seed=1).heldout != task.heldout
    assert len(FilesTask(path).heldout) in (2, 3)  # a tenth where nothing is said
    assert FilesTask(path).identity["heldout_share"] == 0.1


SAME: list[str | tuple[Message, ...]] = [
    "Caf\u00e9?",
    "Cafe\u0301?",
    " Caf\u00e9?\n",
    ({"role": "user", "content": "Caf\u00e9?"},),
    ({"content": "Cafe\u0301? ", "role": "user"},),
]


def test_forms_of_one_prompt_are_on_the_same_side(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected at least two different prompts to divide, got 1"):
        divide([Question(str(i), prompt) for i, prompt in enumerate(SAME)], 0.5, seed=0)
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": prompt} for prompt in SAME])
    other = jsonl(tmp_path / "b.jsonl", [{"prompt": "Caf\u00e9?"}, {"prompt": "caf\u00e9?"}])
    assert FilesTask(other, path).identity["heldout_prompts_in_train"] == 5
    system = {"role": "system", "content": "Caf\u00e9?"}
    others: list[str | tuple[Message, ...]] = ["Cafe?", "Ca f\u00e9?", (system,), (system, *Question("", "x").messages)]
    for different in others:
        train, heldout = divide([Question("a", SAME[0]), Question("b", different)], 0.5, seed=0)
        assert (len(train), len(heldout)) == (1, 1)


def test_a_small_share_is_at_least_one_question() -> None:
    train, heldout = divide([Question(str(i), f"{i}?") for i in range(3)], 0.01, seed=0)
    assert (len(train), len(heldout)) == (2, 1)


def test_the_identity_is_that_of_the_content(tmp_path: Path) -> None:
    one, two = jsonl(tmp_path / "1" / "a.jsonl", ROWS), jsonl(tmp_path / "2" / "a.jsonl", ROWS)
    assert FilesTask(one).identity == FilesTask(two).identity
    json.dumps(FilesTask(one).identity)
    jsonl(two, [*ROWS[:-1], {"question": "19 + 1?", "answer": "21"}])
    files = [FilesTask(path).identity["files"]["train"]["a.jsonl"] for path in (one, two)]
    assert files[0]["rows"] == files[1]["rows"] == 20
    assert files[0]["sha256"] != files[1]["sha256"]


def test_values_stay_usable(tmp_path: Path) -> None:
    day = datetime.datetime(2026, 1, 2, 3, 4)
    table = pa.table({"prompt": ["q", "r"], "day": [day, day], "n": pa.array([1, 2], pa.int32()), "x": [[0.5], None]})
    parquet.write_table(table, tmp_path / "a.parquet")
    data = FilesTask(tmp_path / "a.parquet", 0.5).train[0].data
    assert (data["day"], type(data["n"])) == (day, int)
    json.dumps(data, default=str)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"answer": "1"}, "no prompt: expected text or messages in the column 'question', got no such column"),
        ({"question": None}, "no prompt: expected text or messages in the column 'question', got null"),
        ({"question": " "}, "empty prompt: expected text or messages in the column 'question', got ' '"),
        ({"question": []}, "empty prompt: expected text or messages in the column 'question', got an empty list"),
        ({"question": 7}, "no prompt: expected text or messages in the column 'question', got int '7'"),
        ({"question": ["hi"]}, "message 1 of 'question': expected a role and content, got str"),
        ({"question": [{"content": "hi"}]}, "message 1 of 'question': expected a role, got none"),
        ({"question": [{"role": "user"}]}, "message 1 of 'question': expected content of text, got none"),
        (
            {"question": [{"role": "user", "content": [{"type": "image"}]}]},
            "message 1 of 'question': expected content of text; images and sounds cannot be read",
        ),
        (
            {"question": [{"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": "image"}]}]},
            "message 1 of 'question': expected content of text; images and sounds cannot be read",
        ),
        (
            {"question": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text"}]}]},
            "message 1 of 'question': expected content of text; images and sounds cannot be read",
        ),
        (
            {"question": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
            "'question' ends with a message of the assistant: expected one that the model is to answer",
        ),
        ('{"question": "hi"', "expected JSON on one line, got Expecting ',' delimiter at character 18"),
        ('{"question": NaN}', "expected JSON on one line, got NaN, which JSON does not have"),
        ("[" * 100_000, "expected JSON on one line, got maximum recursion depth exceeded"),
        ("[1]", "expected an object with columns, got list"),
        ("7", "expected an object with columns, got int"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: Any, problem: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", [ROWS[0], row])
    found = message_of(path)
    assert found.startswith(f"task.train: 1 of 2 rows cannot be used: a.jsonl:2: {problem}")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"question": "ok"}\n{"question": "\xff"}\n')
    assert "a.jsonl:2: expected text in UTF-8, got the byte 0xff" in message_of(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"prompt": "a"}\n'.encode("utf-16"), "expected text in UTF-8, got the byte 0xff"),
        (b'[{"prompt": "a"}, {"prompt": "b"}]', "expected an object with columns, got list"),
        (b'{"prompt": "a", "answer": NaN}\n', "expected JSON on one line, got NaN, which JSON does not have"),
        (b'{"prompt": "a"} {"prompt": "b"}\n', "expected JSON on one line, got Extra data at character 17"),
        (b"{}\n{}\n", "expected an object with columns, got an empty one"),
    ],
)
def test_a_file_whose_every_row_is_broken(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    found = message_of(tmp_path / "a.jsonl")
    assert found.startswith("task.train: ")
    assert f"rows cannot be used: a.jsonl:1: {problem}" in found
    jsonl(tmp_path / "b.jsonl", ROWS)
    assert f"a.jsonl:1: {problem}" in message_of(tmp_path / "b.jsonl", tmp_path / "a.jsonl")


def test_a_byte_order_mark_is_none_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"question": "a"}\r\n{"question": "b"}\r\n')
    assert len(FilesTask(tmp_path / "a.jsonl").train) == 1


def test_parts_of_text_are_lines_of_one(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": [{"role": "user", "content": parts}]}])
    assert FilesTask(path, path).train[0].prompt == ({"role": "user", "content": "a\nb"},)


def test_documents_of_a_search_are_read_as_rows_are(tmp_path: Path) -> None:
    """A mark at the beginning, or where two files were joined, is none of the text; another encoding is an error."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "red\xc3\xa9"}\r\n\r\n\xef\xbb\xbf{"text": "blue"}\r\n')
    tool = SearchTool.from_jsonl(path)
    assert (tool("red\u00e9"), tool("blue")) == ("red\u00e9", "blue")
    path.write_bytes(b'{"text": "red"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: expected \{.* in UTF-8, got .*\ufffd"):
        SearchTool.from_jsonl(path)
    path.write_bytes('{"text": "red"}\n'.encode("utf-16"))
    with pytest.raises(ValueError, match=r"a\.jsonl:1: expected \{.* in UTF-8, got .*\ufffd"):
        SearchTool.from_jsonl(path)


def test_an_answer_that_is_not_a_number(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"prompt": ["q", "r"], "answer": [1.0, float("nan")]}), tmp_path / "a.parquet")
    assert "a.parquet:2: expected an answer in the column 'answer', got nan" in message_of(tmp_path / "a.parquet")


def test_many_bad_rows_are_counted(tmp_path: Path) -> None:
    text = message_of(jsonl(tmp_path / "a.jsonl", [*ROWS, *[{"answer": "1"}] * 50]))
    assert text.startswith("task.train: 50 of 70 rows cannot be used: a.jsonl:21: no prompt")
    assert text.endswith("; and 45 more")
    assert len(text) < 700


def test_an_id_that_comes_twice(tmp_path: Path) -> None:
    rows = [{"id": number, "prompt": f"{i}?"} for i, number in enumerate([7, 8, 7])]
    text = message_of(jsonl(tmp_path / "a.jsonl", rows))
    assert "a.jsonl:3: the id '7' is that of a.jsonl:1: expected another, or task.columns.id=''" in text
    assert "a.jsonl:1: expected an id" in message_of(jsonl(tmp_path / "a.jsonl", [{"id": None, "prompt": "?"}]))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"train": None}, "task.train = None: expected a .jsonl or .parquet file"),
        ({"train": []}, "task.train = []: expected a .jsonl"),
        ({"train": "nowhere.jsonl"}, "there is no such file"),
        ({"train": "{tmp}/a.csv"}, "expected a .jsonl or .parquet file, a pattern of such files, or a directory"),
        ({"train": "{tmp}"}, "this directory has no state.json"),
        ({"train": ["{tmp}/a.jsonl", "{tmp}/a.jsonl"]}, "task.train: expected every file once"),
        ({"heldout": 1.0}, "task.heldout = 1.0: expected files or a share of task.train in (0, 1)"),
        ({"heldout": float("nan")}, "task.heldout = nan: expected files or a share"),
        ({"heldout": True}, "task.heldout = True: expected files or a share"),
        ({"heldout": "{tmp}/empty.jsonl"}, "task.heldout: expected at least one row, got none"),
        ({"train": "{tmp}/empty.jsonl", "heldout": "{tmp}/a.jsonl"}, "task.train: expected at least one row, got none"),
        ({"train": "{tmp}/one.jsonl"}, "task.heldout = 0.1: expected at least two different prompts to divide, got 1"),
        ({"train": "{tmp}/broken.parquet"}, "broken.parquet: cannot be read as parquet: "),
        ({"columns": {"promt": "question"}}, "task.columns.promt: expected one of prompt, answer, id, kind"),
        (
            {"columns": {"answer": "solution"}},
            "task.columns.answer = 'solution': expected one of the columns question, answer",
        ),
        ({"train": "{tmp}/other.jsonl"}, "task.columns.prompt: expected one of the columns prompt, question"),
    ],
)
def test_settings_that_cannot_be_used(tmp_path: Path, settings: Mapping[str, Any], problem: str) -> None:
    jsonl(tmp_path / "a.jsonl", ROWS)
    jsonl(tmp_path / "empty.jsonl", [])
    jsonl(tmp_path / "one.jsonl", ROWS[:1] * 3)
    jsonl(tmp_path / "other.jsonl", [{"text": "hi"}])
    (tmp_path / "a.csv").write_text("question,answer\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")

    def placed(value: Any) -> Any:
        if isinstance(value, list):
            return [placed(item) for item in value]
        return value.format(tmp=tmp_path) if isinstance(value, str) else value

    given = {name: placed(value) for name, value in {"train": "{tmp}/a.jsonl", **settings}.items()}
    assert problem in message_of(given.pop("train"), **given)


def test_files_bring_no_reward(tmp_path: Path) -> None:
    assert FilesTask(jsonl(tmp_path / "a.jsonl", ROWS)).rewards == {}


def test_a_hundred_thousand_rows_load_in_seconds(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        file.writelines(json.dumps({"prompt": f"What is {i} + 1?", "answer": i + 1}) + "\n" for i in range(100_000))
    start = time.process_time()
    assert len(FilesTask(path).train) == 90_000
    assert time.process_time() - start < 10  # about 2 s where this was written


def test_a_share_smaller_than_every_prompt_holds_out_the_rarest_one() -> None:
    """Of four prompts that come 5, 4, 3 and 2 times, whichever is drawn first."""
    questions = [Question(f"{prompt} {i}", prompt) for times, prompt in enumerate("abcd", 2) for i in range(times)]
    for seed in range(8):
        train, heldout = divide(questions, 0.05, seed)
        assert ([q.prompt for q in heldout], len(train)) == (["a", "a"], 12)
