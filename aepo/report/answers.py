"""Held-out answers of all evaluations in the form in which the page shows them (templates/answers.js)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aepo.report.files import fitting, read_lines, read_part, rounded
from aepo.report.trees import page_question

MAX_CHARACTERS = 2_000_000  # of all answers in a page
MAX_TEXT = 8_000  # of one answer; the middle of a longer one is left out
SHOWN = ("success", "reward", "finish_reason", "tool_calls", "tool_failures", "tokens")

Records = Sequence[Mapping[str, Any]]


def read_answers(folder: Path, problems: list[str]) -> dict[str, Any] | None:
    """Who was right when: of every question its success at each evaluation, and the answers of as many evaluations
    as a page can hold. None: no answers were saved."""
    evaluations: list[tuple[int, Records]] = []
    for file in sorted(folder.glob("step_*.jsonl")):
        records = [
            record
            for record in read_part(file, lambda path: read_lines(path, problems), problems) or ()
            if _is_answer(record, file.name, problems)
        ]
        if records:
            evaluations.append((records[0]["step"], records))
    if not evaluations:
        return None
    sizes = [sum(min(len(one["text"]), MAX_TEXT) for one in _samples(records)) for _, records in evaluations]
    kept = fitting(sizes, MAX_CHARACTERS)
    if len(kept) < len(evaluations):
        problems.append(
            f"answers: the texts of {len(kept)} of {len(evaluations)} evaluations are shown, to keep the page small"
        )
    return {
        "steps": [step for step, _ in evaluations],
        "texts": [evaluations[i][0] for i in kept],
        "questions": _questions(evaluations, {evaluations[i][0] for i in kept}),
    }


def _is_answer(record: Mapping[str, Any], name: str, problems: list[str]) -> bool:
    """Whether a record has all that is looked at; if not, it is listed."""
    try:
        page_question(record["question"])
        if record["samples"] and all(isinstance(one["text"], str) and "success" in one for one in record["samples"]):
            return True
        raise ValueError("no samples with text and success")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problems.append(f"{name}: not an answer, left out ({type(error).__name__}: {error})")
        return False


def _questions(evaluations: Sequence[tuple[int, Records]], with_text: set[int]) -> list[dict[str, Any]]:
    questions: dict[str, dict[str, Any]] = {}
    for index, (step, records) in enumerate(evaluations):
        for record in records:
            asked = page_question(record["question"])
            entry = questions.setdefault(asked["id"], {**asked, "success": [None] * len(evaluations), "samples": {}})
            samples = record["samples"]
            entry["success"][index] = rounded(sum(bool(one["success"]) for one in samples) / len(samples), 4)
            if step in with_text:
                entry["samples"][str(step)] = [_page_sample(one) for one in samples]
    return list(questions.values())


def _page_sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    answer = sample.get("answer")
    return {
        "text": _shortened(sample["text"]),
        "answer": None if answer is None else _shortened(str(answer)),
        "components": {str(name): _number(value) for name, value in (sample.get("components") or {}).items()},
        **{name: _number(sample.get(name)) for name in SHOWN},
    }


def _number(value: Any) -> Any:
    if isinstance(value, float):
        return rounded(value, 4)
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _shortened(text: str) -> str:
    if len(text) <= MAX_TEXT:
        return text
    half = MAX_TEXT // 2
    return f"{text[:half]}\n[{len(text) - 2 * half:,} characters are left out here]\n{text[-half:]}"


def _samples(records: Records) -> Iterable[Mapping[str, Any]]:
    return (sample for record in records for sample in record["samples"])
