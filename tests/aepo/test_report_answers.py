"""Held-out answers on the page: every question's success at every evaluation, and as many texts as it can hold."""

import json

from report_toys import answer_line, make_run, page_data, save_answers

from aepo.report import answers as page_answers
from aepo.report import write_report
from aepo.report.answers import MAX_TEXT, read_answers


def test_success_of_every_question_at_every_evaluation(tmp_path):
    run = make_run(tmp_path / "run")
    save_answers(run, 0, answer_line(0, "q1", False), answer_line(0, "q2", True, False))
    save_answers(run, 10, answer_line(10, "q2", False, False), answer_line(10, "q1", True), answer_line(10, "q3", True))
    answers = page_data(write_report([run]).read_text(encoding="utf-8"))["runs"][0]["answers"]
    assert answers["steps"] == answers["texts"] == [0, 10]
    assert {entry["id"]: entry["success"] for entry in answers["questions"]} == {
        "q1": [0.0, 1.0], "q2": [0.5, 0.0], "q3": [None, 1.0],
    }  # fmt: skip
    (sample,) = answers["questions"][0]["samples"]["10"]
    assert sample == {"text": "so it is", "answer": "42", "reward": 1.0, "success": True, "finish_reason": "answered",
                      "tool_calls": 2, "tool_failures": 1, "tokens": 30, "components": {"answer": 1.0}}  # fmt: skip


def test_a_run_without_answers_has_none(tmp_path):
    run = make_run(tmp_path / "run")
    problems = []
    assert read_answers(run / "answers", problems) is None
    assert problems == []
    assert page_data(write_report([run]).read_text(encoding="utf-8"))["runs"][0]["answers"] is None


def test_damaged_answers_are_listed_and_left_out(tmp_path):
    run = make_run(tmp_path / "run")
    odd = json.loads(answer_line(5, "q2", True))
    odd["samples"][0]["tokens"] = [1, 2]
    odd["samples"][0]["reward"] = float("nan")
    no_samples = json.dumps({"step": 5, "question": {"id": "q9", "text": "?"}, "samples": []}) + "\n"
    cut = answer_line(5, "q3", True)[:-20]
    save_answers(run, 5, answer_line(5, "q1", True), json.dumps(odd) + "\n", no_samples, '{"step": 5}\n', cut)
    problems = []
    answers = read_answers(run / "answers", problems)
    assert [entry["id"] for entry in answers["questions"]] == ["q1", "q2"]
    sample = answers["questions"][1]["samples"]["5"][0]
    assert (sample["tokens"], sample["reward"]) == ("[1, 2]", None)
    assert [problem.split(":")[0] for problem in problems] == ["step_000005.jsonl, line 5"] + ["step_000005.jsonl"] * 2
    assert "cut off" in problems[0]
    page_data(write_report([run]).read_text(encoding="utf-8"))


def test_texts_are_thinned_evenly_and_success_is_not(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    for step in range(0, 50, 10):
        save_answers(run, step, answer_line(step, "q1", step > 20, text="x" * 100))
    monkeypatch.setattr(page_answers, "MAX_CHARACTERS", 350)
    problems = []
    answers = read_answers(run / "answers", problems)
    assert answers["texts"] == [0, 20, 40]
    assert [*answers["questions"][0]["samples"]] == ["0", "20", "40"]
    assert answers["questions"][0]["success"] == [0.0, 0.0, 0.0, 1.0, 1.0]
    assert problems == ["answers: the texts of 3 of 5 evaluations are shown, to keep the page small"]


def test_the_middle_of_a_long_text_is_left_out_and_that_is_said(tmp_path):
    run = make_run(tmp_path / "run")
    save_answers(run, 1, answer_line(1, "q1", True, text="a" * MAX_TEXT + "b" * 1000))
    text = read_answers(run / "answers", [])["questions"][0]["samples"]["1"][0]["text"]
    assert text.startswith("aaaa")
    assert text.endswith("bbbb")
    assert "[1,000 characters are left out here]" in text
    assert text.count("a") > MAX_TEXT // 2
