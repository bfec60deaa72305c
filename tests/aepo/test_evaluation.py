"""What answers say, by hand: means, kinds, pass@k and which of them have an interval."""

from __future__ import annotations

import itertools
import json
import pathlib
import re
from typing import Any, cast, get_args

import pytest
from trainer_toys import ToyFormat, ToyLanguageModel, toy_agent

from aepo.answers import Answer, AnsweredQuestion, read_answers, write_answers
from aepo.config import load_config
from aepo.estimates import interval
from aepo.evaluation import (
    Evaluator,
    answer_intervals,
    answer_metrics,
    questions_at_once,
    sampled_questions,
    scored_rollouts,
)
from aepo.rollout.engines.huggingface.engine import HuggingFaceEngine
from aepo.rollout.sampler import Sampler
from aepo.scoring import Scorer
from aepo.types import (
    ErrorKind,
    FinishReason,
    Node,
    Path,
    Question,
    Reward,
    RolloutTree,
    ScoredTree,
    ToolCall,
    ToolResult,
)


def answer(success: bool, finish_reason: FinishReason = "answered", **changed: object) -> Answer:
    given = {"tool_calls": 2, "tool_failures": 0, "tokens": 10, "reward": 0.1 + success, **changed}
    return Answer("<answer>7</answer>", "7", success=success, finish_reason=finish_reason, components={}, **given)


def question(index: int, kind: str = "") -> Question:
    return Question(id=f"q{index}", prompt=f"What is {index}?", answer=index, kind=kind)


ANSWERED = [
    AnsweredQuestion(question(0, "even"), (answer(True), answer(True), answer(False), answer(False))),
    AnsweredQuestion(question(1, "odd"), (answer(False), answer(False), answer(False), answer(True))),
    AnsweredQuestion(
        question(2, "even"),
        (answer(False, "length", tokens=50), answer(False, "eos", tool_calls=4, tool_failures=3), *[answer(False)] * 2),
    ),
]


def test_metrics_by_hand() -> None:
    record = answer_metrics(ANSWERED, pass_at=(1, 2, 4))
    expected = {
        "success": 3 / 12,
        "success.even": 2 / 8,
        "success.odd": 1 / 4,
        "pass@1": 3 / 12,
        "pass@2": (5 / 6 + 1 / 2 + 0) / 3,  # of the six pairs one has no success, three have none, all have none
        "pass@2.even": 5 / 12,
        "pass@2.odd": 1 / 2,
        "pass@4": 2 / 3,
        "reward": 0.1 + 3 / 12,
        "questions": 3,
        "samples": 4,
        "tool_calls": (11 * 2 + 4) / 12,
        "tool_failures": 3 / 12,
        "tokens": (11 * 10 + 50) / 12,
        "finish.answered": 10 / 12,
        "finish.length": 1 / 12,
        "finish.eos": 1 / 12,
        "finish.tool_limit": 0,
    }
    assert {name: record[name] for name in expected} == pytest.approx(expected)
    assert set(record) - set(expected) == {"pass@1.even", "pass@1.odd", "pass@4.even", "pass@4.odd"}


def test_one_sample_has_no_pass_at_k_and_no_name_no_kind() -> None:
    answered = [AnsweredQuestion(question(i), (answer(i > 0),)) for i in range(3)]
    record = answer_metrics(answered, pass_at=(1,))
    assert [name for name in record if name.startswith(("success", "pass"))] == ["success"]
    assert record["success"] == pytest.approx(2 / 3)


def test_components_are_means_over_the_answers_that_have_them() -> None:
    first = Answer("", None, 1.0, True, "answered", 0, 0, 1, {"digit": 1.0, "judge": 0.5})
    second = Answer("", None, 0.0, False, "answered", 0, 0, 1, {"digit": 0.0})
    record = answer_metrics([AnsweredQuestion(question(0), (first, second))])
    assert (record["reward.digit"], record["reward.judge"]) == (0.5, 0.5)


def test_intervals_resample_questions_not_answers() -> None:
    """Sixteen copies of the same answer are no more evidence than one."""
    once = [AnsweredQuestion(question(i), (answer(i % 3 == 0),)) for i in range(30)]
    copied = [AnsweredQuestion(item.question, item.samples * 16) for item in once]
    assert answer_intervals(once, (), seed=0)["success"] == answer_intervals(copied, (), seed=0)["success"]


def test_which_metrics_have_an_interval() -> None:
    found = answer_intervals(ANSWERED, (2,), seed=0)
    assert list(found) == ["success", "success.even", "success.odd", "pass@2", "pass@2.even", "pass@2.odd", "reward"]
    assert found["success.odd"] is None, "one question"
    assert found["success"] == interval([0.5, 0.25, 0.0], seed=0)
    low, high = found["pass@2"] or (0, 0)
    assert 0 <= low < high <= 5 / 6


def test_a_kind_may_be_called_low() -> None:
    answered = [AnsweredQuestion(question(i, ("low", "high", "interval")[i % 3]), (answer(i < 4),)) for i in range(9)]
    record = answer_metrics(answered)
    assert (record["success.low"], record["success.high"], record["success.interval"]) == (2 / 3, 1 / 3, 1 / 3)


def test_a_file_of_answers(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "answers.jsonl"
    write_answers(path, 10, ANSWERED)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 10, 10]
    assert lines[1]["question"] == {"id": "q1", "text": "What is 1?", "answer": 1, "kind": "odd"}
    assert [sample["success"] for sample in lines[1]["samples"]] == [False, False, False, True]
    assert lines[2]["samples"][1] == {
        "text": "<answer>7</answer>",
        "answer": "7",
        "reward": 0.1,
        "success": False,
        "finish_reason": "eos",
        "tool_calls": 4,
        "tool_failures": 3,
        "tokens": 10,
        "components": {},
    }


def test_a_file_of_answers_is_whole_or_what_it_was(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "answers.jsonl"
    write_answers(path, None, ANSWERED[:1])
    before = path.read_bytes()

    def ends_early() -> object:
        yield ANSWERED[0]
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="disk is full"):
        write_answers(path, None, ends_early())  # type: ignore[arg-type]
    assert path.read_bytes() == before


def test_answers_are_read_from_paths_that_share_nodes() -> None:
    """Two paths, one branched from the other after calls in one turn, of which one did not fail, and each other way."""
    word, done = ToyFormat()._encode, ToolResult("4", None, 0.1)
    call, failed = ToolCall("search", {"query": "1"}), [ToolResult("error", kind, 0.1) for kind in get_args(ErrorKind)]

    def model(index: int, parent: int, text: str) -> Node:
        tokens = word(text)
        numbers = (-1.0,) * len(tokens)
        return Node(index, parent, "model", tokens, numbers, numbers, finish_reason="stop")

    nodes = (
        Node(0, None, "prompt", word("? 1 ?")),
        model(1, 0, "<search> 1 </search>"),
        Node(2, 1, "tool", word("<result> 4 </result>"), calls=(call,) * 7, results=(done, *failed)),
        model(3, 2, "<answer> 7 </answer>"),
        model(4, 2, "2 <answer> 4 4 </answer>"),
    )
    paths = (Path(0, 3, None, None, "answered"), Path(1, 4, 0, 2, "length"))
    rewards = (Reward(1.0, {"digit": 1.0}, True), Reward(0.5, {}, False))
    item = read_answers(ScoredTree(RolloutTree(question(1), nodes, paths, (), None), rewards), ToyFormat())
    assert item.question == question(1)
    first, second = item.samples
    assert first.text == "<search>1</search><result>4</result><answer>7</answer>"
    assert (first.answer, first.reward, first.success, first.components) == (
        "<answer>7</answer>",
        1.0,
        True,
        {"digit": 1},
    )
    assert (first.tool_calls, first.tool_failures, first.tokens) == (7, 6, 3 + 3)
    assert (second.tool_calls, second.tool_failures, second.tokens) == (7, 6, 3 + 5)
    assert (second.answer, second.finish_reason, second.reward) == (None, "length", 0.5)


def test_some_questions_are_always_the_same_and_of_every_kind() -> None:
    ten = [question(i) for i in range(10)]
    ids = [[q.id for q in sampled_questions(ten, count)] for count in (3, 99, None)]
    assert len(set(ids[0])) == 3
    assert ids[0] == sorted(ids[0]) == [q.id for q in sampled_questions(ten, 3)]
    cycling = [question(i, "abc"[i % 3]) for i in range(90)]  # every n-th of which would miss a kind
    assert {q.kind for q in sampled_questions(cycling, 30)} == {"a", "b", "c"}
    assert ids[1] == ids[2] == [f"q{i}" for i in range(10)]


def test_as_many_questions_at_once_as_a_training_batch_has_paths() -> None:
    small = load_config(overrides=["train.questions=4", "rollout.paths=6"])
    assert [questions_at_once(small, paths) for paths in (1, 8, 100)] == [24, 3, 1]
    vllm = load_config(overrides=["rollout.engine=vllm", "vllm.max_num_seqs=256"])
    assert questions_at_once(vllm, 8) == 128


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["eval.samples=4"], "eval.samples = 4: expected 1 with eval.temperature = 0"),
        (
            ["eval.samples=4", "eval.temperature=1", "eval.pass_at=[1,5]"],
            "eval.pass_at = (1, 5): expected each at most",
        ),
    ],
)
def test_settings_that_do_not_go_together(settings: list[str], expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        load_config(overrides=settings)
    assert "\n" not in str(caught.value)


def test_subsets_by_hand_are_right() -> None:
    """The numbers of the first test, from the answers themselves."""
    for item, expected in zip(ANSWERED, (5 / 6, 1 / 2, 0), strict=True):
        pairs = list(itertools.combinations([sample.success for sample in item.samples], 2))
        assert sum(any(pair) for pair in pairs) / len(pairs) == expected


def test_what_an_evaluator_asks_the_sampler_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths from the question at the temperature of evaluations, random numbers of no training step, a judge."""
    asked: list[tuple[int, Any]] = []
    rollout = Sampler.rollout

    def recorded(sampler: Sampler, questions: Any, seed: int, *, judge: Any, **named: Any) -> list[RolloutTree]:
        trees = rollout(sampler, questions, seed, judge=judge, **named)
        assert sampler._config.fresh_paths == sampler._config.paths == len(trees[0].paths)
        asked.append((seed, judge))
        return trees

    monkeypatch.setattr(Sampler, "rollout", recorded)
    agent, language_model = toy_agent(), ToyLanguageModel()
    engine = HuggingFaceEngine(language_model.model, language_model.tokenizer, language_model.eos_ids)
    scorer = Scorer(agent.rewards, agent.format)
    settings = ["rollout.max_tokens=30", "rollout.branch_threshold=-9", "run.seed=3", "train.questions=1"]

    def texts(*more: str) -> list[str]:
        evaluator = Evaluator(engine, agent, scorer, load_config(overrides=[*settings, *more]))
        return [s.text for item in evaluator.answers(agent.task.heldout) for s in item.samples]

    greedy = texts()
    assert greedy == texts("run.seed=4"), "greedy answers need no random numbers"
    sampled = texts("eval.samples=32", "eval.temperature=1")
    assert len(sampled) == 32 * len(greedy) > len(set(greedy))
    assert sampled == texts("eval.samples=32", "eval.temperature=1"), "every evaluation draws the same ones"
    assert sampled != texts("eval.samples=32", "eval.temperature=1", "run.seed=4")
    seeds = {seed for seed, _ in asked}
    assert {seed >> 32 for seed in seeds} == {3, 4}
    assert min(seed % 2**32 for seed in seeds) >= 2**31, "steps are below"
    assert all(judge == scorer.begin for _, judge in asked)


def test_two_samples_have_a_pass_at_k() -> None:
    answered = [AnsweredQuestion(question(0), (answer(True), answer(False)))]
    record = answer_metrics(answered, pass_at=(1, 2))
    assert (record["success"], record["pass@1"], record["pass@2"]) == (0.5, 0.5, 1.0)


def test_progress_counts_the_paths_of_all_questions() -> None:
    class Silent:
        def rollout(self, questions: Any, seed: int, *, progress: Any, judge: Any) -> list[RolloutTree]:
            for finished in range(1, 4 * len(questions) + 1):  # of four paths each
                progress(finished, 4 * len(questions))
            return []

    said: list[tuple[int, int]] = []
    scorer = Scorer(toy_agent().rewards, ToyFormat())
    questions = [question(i) for i in range(5)]
    list(
        scored_rollouts(
            cast(Sampler, Silent()), scorer, questions, 0, at_once=2, progress=lambda *numbers: said.append(numbers)
        )
    )
    assert said == [(finished, 20) for finished in range(1, 21)]
