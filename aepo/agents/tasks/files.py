"""Questions from the user's own files, with the columns of TRL's and of verl's data."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aepo.agents.protocol import RewardFunction, Task, Tool
from aepo.agents.tasks.columns import MISSING, Role, choose_columns, look_up, read_answer, read_prompt
from aepo.agents.tasks.rows import BadRow, Source, Split, find_sources, saved_splits
from aepo.types import Question

HELDOUT_SHARE = 0.1
SHOWN = 5  # bad rows in an error

_Row = tuple[Source, int, Any]  # file, number, row


class FilesTask(Task):
    """Questions from files; docs/data.md.

    train: a .jsonl or .parquet file, a pattern of files, a directory that `datasets` saved, or a list of these.
    heldout: the same, or a share of `train` in (0, 1), divided by `seed`; None: the test splits of such directories, or
    else a tenth. columns: which of them are prompt, answer, id and kind; those not named are guessed.
    ValueError, in one line: files or columns that are not there, rows that cannot be used, or no question.
    """

    name = "files"

    def __init__(
        self,
        train: Any,
        heldout: Any = None,
        columns: Mapping[str, str] | None = None,
        *,
        seed: int = 0,
        rewards: Mapping[RewardFunction, float] | None = None,
        tools: Sequence[Tool | Callable[..., Any]] = (),
        environment: type | None = None,
        system: str | None = None,
    ) -> None:
        self.tools, self.environment, self.system = tools, environment, system
        self._rewards = rewards
        sources: dict[Split, list[Source]] = {"train": find_sources(train, "train")}
        if heldout is None:
            heldout = saved_splits(train, "heldout") or HELDOUT_SHARE
        share = heldout if isinstance(heldout, (int, float)) else None
        if share is None:
            sources["heldout"] = find_sources(heldout, "heldout")
        elif isinstance(share, bool) or not 0 < share < 1:
            raise ValueError(f"task.heldout = {heldout!r}: expected files or a share of task.train in (0, 1)")
        rows = {
            split: [(s, number, row) for s in found for number, row in s.rows()] for split, found in sources.items()
        }
        if empty := next((split for split, found in rows.items() if not found), None):
            raise ValueError(f"task.{empty}: expected at least one row, got none")
        columned = [row for found in rows.values() for _, _, row in found if isinstance(row, dict) and row]
        if not columned:  # what is wrong with the rows says more than that they have no columns
            _questions(rows["train"], {}, "train")
        self.columns = choose_columns(columns or {}, columned)
        read = {split: _questions(found, self.columns, split) for split, found in rows.items()}
        self.train = read["train"]
        if share is None:
            self.heldout = read["heldout"]
        else:
            self.train, self.heldout = divide(self.train, share, seed)
        self._identity = self._make_identity(sources, rows, share, seed)

    @property
    def rewards(self) -> Mapping[RewardFunction, float]:
        """Questions from files have no reward of their own."""
        return self._rewards or {}

    @property
    def identity(self) -> Mapping[str, Any]:
        """Files with their rows and hashes, the columns that were used, and how the questions were divided."""
        return self._identity

    def _make_identity(
        self,
        sources: Mapping[Split, Sequence[Source]],
        rows: Mapping[Split, Sequence[_Row]],
        share: float | None,
        seed: int,
    ) -> dict[str, Any]:
        counts: dict[Source, int] = {}
        for source, _, _ in (row for found in rows.values() for row in found):
            counts[source] = counts.get(source, 0) + 1
        files: dict[str, Any] = {
            split: {source.name: {"rows": counts.get(source, 0), "sha256": source.sha256()} for source in found}
            for split, found in sources.items()
        }
        if share is None:
            seen = set(map(_prompt_key, self.train))
            division: dict[str, float] = {
                "heldout_prompts_in_train": sum(_prompt_key(question) in seen for question in self.heldout)
            }
        else:
            division = {"heldout_share": share, "seed": seed}
        return {"columns": dict(self.columns), "files": files, **division}


def divide(questions: Sequence[Question], share: float, seed: int) -> tuple[list[Question], list[Question]]:
    """Training and held-out questions, each in their order. Those with the same prompt are on the same side: its
    Unicode form, space around it, and whether it is a text or one message of a user make no difference.

    ValueError: all have the same prompt.
    """
    groups: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        groups.setdefault(_prompt_key(question), []).append(index)
    if len(groups) < 2:
        raise ValueError(
            f"task.heldout = {share}: expected at least two different prompts to divide, got {len(groups)}; the "
            "held-out set would be empty"
        )
    order = list(groups.values())
    random.Random(f"heldout {seed}").shuffle(order)
    chosen: set[int] = set()
    for group in order:
        if len(chosen) + len(group) <= share * len(questions):
            chosen.update(group)
    chosen = chosen or set(sorted(order, key=len)[0])
    train = [question for index, question in enumerate(questions) if index not in chosen]
    return train, [questions[index] for index in sorted(chosen)]


def _prompt_key(question: Question) -> str:
    """Equal where people would read the same: after NFC, stripped, a text being what a user says."""
    plain = [
        {**message, "content": unicodedata.normalize("NFC", message["content"]).strip()}
        for message in question.messages
    ]
    return json.dumps(plain, sort_keys=True, default=str)


def _questions(rows: Sequence[_Row], columns: Mapping[Role, str | None], split: Split) -> list[Question]:
    """ValueError: some rows cannot be used."""
    names = dict.fromkeys(name for _, _, row in rows if isinstance(row, dict) for name in row)
    questions: list[Question] = []
    bad: list[str] = []
    places: dict[str, str] = {}
    for source, number, row in rows:
        place = f"{source.name}:{number}"
        question = _question(row, place, columns, names)
        if isinstance(question, Question) and question.id in places:
            first = places[question.id]
            question = BadRow(f"the id {question.id!r} is that of {first}: expected another, or task.columns.id=''")
        if isinstance(question, BadRow):
            bad.append(f"{place}: {question.problem}")
        else:
            places[question.id] = place
            questions.append(question)
    if bad:
        more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise ValueError(f"task.{split}: {len(bad)} of {len(rows)} rows cannot be used: {'; '.join(bad[:SHOWN])}{more}")
    return questions


def _question(row: Any, place: str, columns: Mapping[Role, str | None], names: Mapping[str, None]) -> Question | BadRow:
    if isinstance(row, BadRow):
        return row
    if not isinstance(row, dict) or not row:
        return BadRow(f"expected an object with columns, got {type(row).__name__ if row != {} else 'an empty one'}")
    assert columns["prompt"] is not None
    prompt = read_prompt(look_up(row, columns["prompt"]), columns["prompt"])
    answer = read_answer(row, columns["answer"])
    if isinstance(prompt, BadRow):
        return prompt
    if isinstance(answer, BadRow):
        return answer
    identity = place if columns["id"] is None else look_up(row, columns["id"])
    if identity in (MISSING, None, ""):
        return BadRow(f"expected an id in the column {columns['id']!r}, got none")
    kind = MISSING if columns["kind"] is None else look_up(row, columns["kind"])
    # A column that only other rows have is null, as `datasets` reads it: rewards get it for all or for none.
    data = row if len(row) == len(names) else {**dict.fromkeys(names), **row}
    data.pop(columns["prompt"], None)
    return Question(str(identity), prompt, answer, "" if kind in (MISSING, None) else str(kind), data)
