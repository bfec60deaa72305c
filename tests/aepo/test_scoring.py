"""From hand-made trees to responses and rewards."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from scoring_toys import CharacterFormat, ToyTask, tokens, tree_of

from aepo.agents.protocol import RewardFunction, RewardValue, Task
from aepo.agents.rewards.make import make_rewards
from aepo.scoring import RewardError, Scorer, read_response, read_responses
from aepo.types import Question, Response, Reward

QUESTION = Question("q1", "?", "7", "sums", {"solution": "7"})


def right(question: Question, response: Response) -> float:
    return float(response.answer == question.answer)


def scorer_of(task: Task, success: float = 1.0) -> Scorer:
    return Scorer(task.rewards, CharacterFormat(), success, [*task.train[:1], *task.heldout[:1]])


def test_a_response_is_what_the_path_says() -> None:
    tree = tree_of(QUESTION, ["{7}", "hm!{8}"])
    first, second = read_responses(CharacterFormat(), tree)
    assert first.text == "so[find x](found){7}"  # without the end-of-turn token
    assert first.token_ids == tokens("so[find x](found){7}\0")
    assert [turn.content for turn in first.turns] == ["so", "{7}"]
    assert [(call.tool, dict(call.arguments), result.text) for call, result in first.calls] == [
        ("find", {"q": "x"}, "found")
    ]
    assert (first.answer, first.well_formed) == ("7", True)
    assert (second.answer, second.well_formed) == ("8", False)
    assert read_response(CharacterFormat(), tree, 1) == second


def test_shared_nodes_are_read_once() -> None:
    chat_format = CharacterFormat()
    read_responses(chat_format, tree_of(QUESTION, ["{7}", "{8}", "{9}"]))
    assert chat_format.reads == 4


def test_a_turn_is_read_with_what_it_follows(monkeypatch) -> None:
    read, follows = CharacterFormat.read, []

    def remembering(self, token_ids, finish_reason, *, before):
        follows.append((self.decode(before), self.decode(token_ids)))
        return read(self, token_ids, finish_reason)

    monkeypatch.setattr(CharacterFormat, "read", remembering)
    tree = tree_of(QUESTION, ["{7}", "{8}"])
    read_responses(CharacterFormat(), tree)
    assert follows == [("?", "so[find x]"), ("(found)", "{7}\0"), ("(found)", "{8}\0")]
    follows.clear()
    read_response(CharacterFormat(), tree, 1)
    assert follows == [("?", "so[find x]"), ("(found)", "{8}\0")]


def test_one_function() -> None:
    tree = tree_of(QUESTION, ["{7}", "hm!{8}"])
    [scored] = scorer_of(ToyTask(right)).score([tree])
    assert scored.tree is tree
    assert scored.rewards == (
        Reward(1.0, {"format": 1.0, "tool_calls": 1.0, "right": 1.0}, True),
        Reward(0.0, {"format": 0.0, "tool_calls": 1.0, "right": 0.0}, False),
    )


def test_weights_and_functions_that_do_not_apply() -> None:
    def short(question: Question, response: Response) -> float | None:
        return None if response.answer == "8" else 0.5

    def only_eight(question: Question, response: Response) -> float | None:
        return 1.0 if response.answer == "8" else None

    task = ToyTask(weights={only_eight: 1, short: 2.0})
    [scored] = scorer_of(task, success=0.5).score([tree_of(QUESTION, ["{7}", "{8}"])])
    first, second = scored.rewards
    assert (first.total, first.success) == (1.0, True)  # 2 * 0.5; the first function that applies gives 0.5
    assert first.components == {"format": 1.0, "tool_calls": 1.0, "short": 0.5}
    assert (second.total, second.success) == (1.0, True)


def test_success_is_the_first_functions() -> None:
    def half(question: Question, response: Response) -> float:
        return 0.5

    task = ToyTask(half, right)
    [scored] = scorer_of(task).score([tree_of(QUESTION, ["{7}"])])
    assert (scored.rewards[0].total, scored.rewards[0].success) == (1.5, False)


@pytest.mark.parametrize("answer", ["7", None])
@pytest.mark.parametrize("order", [["numbers", "format"], ["format", "numbers"], ["environment", "format", "numbers"]])
def test_format_does_not_say_what_is_right(order: list[str], answer: str | None) -> None:
    """Wherever it stands; and where no other function applies, nothing is right. There is no environment."""
    scorer = Scorer(make_rewards(order), CharacterFormat())
    [scored] = scorer.score([tree_of(Question("q1", "?", answer), ["{7}", "{8}", "{7}!"])])
    assert [reward.total for reward in scored.rewards] == ([2.0, 1.0, 1.0] if answer else [1.0, 1.0, 0.0])
    assert [reward.success for reward in scored.rewards] == ([True, False, True] if answer else [False] * 3)


def test_format_alone_decides() -> None:
    [scored] = Scorer(make_rewards("format"), CharacterFormat()).score([tree_of(QUESTION, ["{8}", "{7}!"])])
    assert [reward.success for reward in scored.rewards] == [True, False]


def test_a_users_own_function_decides_where_those_before_it_do_not_apply() -> None:
    def eight(question: Question, response: Response) -> float:
        return float(response.answer == "8")

    scorer = Scorer({**make_rewards(["numbers", "format"]), eight: 1.0}, CharacterFormat())
    [scored] = scorer.score([tree_of(Question("q1", "?"), ["{7}", "{8}"])])
    assert [reward.success for reward in scored.rewards] == [False, True]


def test_a_reward_says_itself_what_success_is() -> None:
    class Own(Task):
        def reward(self, question: Question, response: Response) -> Reward:
            return Reward(0.1, {"correct": 1.0, "format": 0.25}, True)

    [scored] = scorer_of(Own()).score([tree_of(QUESTION, ["{7}"])])
    assert scored.rewards == (Reward(0.1, {"format": 0.25, "tool_calls": 1.0, "correct": 1.0}, True),)


def test_no_function_applies() -> None:
    def never(question: Question, response: Response) -> None:
        return None

    with pytest.raises(RewardError, match="question 'q1', path 0: no reward applies; never returned None"):
        scorer_of(ToyTask(never)).score([tree_of(QUESTION, ["{7}"])])


def test_a_function_that_raises_is_named_with_the_question_and_the_path() -> None:
    def picky(question: Question, response: Response) -> float:
        return 1 / (response.answer != "8")

    with pytest.raises(RewardError, match=r"reward picky, question 'q1', path 1: ZeroDivisionError.*test_scoring") as e:
        scorer_of(ToyTask(picky)).score([tree_of(QUESTION, ["{7}", "{8}"])])
    assert isinstance(e.value.__cause__, ZeroDivisionError)


def judge_of(together: int) -> tuple[RewardFunction, list[str]]:
    """None answers before so many were asked: one after the other, they would never. Also those that were asked."""
    asked: list[str] = []

    async def judge(question: Question, response: Response) -> float:
        asked.append(question.id)
        for _ in range(20_000):
            if len(asked) >= together:
                return float(response.answer == "7")
            await asyncio.sleep(0.001)
        raise TimeoutError

    return judge, asked


def test_a_judge_works_while_others_roll_out() -> None:
    judge, asked = judge_of(8)
    scorer = scorer_of(ToyTask(judge, right))
    trees = [tree_of(Question(f"q{i}", "?", "7"), ["{7}", "{8}"]) for i in range(4)]

    async def rollout() -> None:
        begun = []
        for tree in trees:
            work = scorer.begin(tree)
            assert work is not None
            begun.append(asyncio.ensure_future(work))
            await asyncio.sleep(0)  # the rest of the rollout
        await asyncio.gather(*begun)

    asyncio.run(rollout())
    scored = scorer.score(trees)
    assert [[reward.total for reward in tree.rewards] for tree in scored] == [[2.0, 0.0]] * 4
    assert sorted(asked) == [f"q{i}" for i in range(4) for _ in range(2)], "nobody is asked again"


def test_what_was_not_begun_is_run_by_score() -> None:
    judge, asked = judge_of(2)
    scorer = scorer_of(ToyTask(judge))
    trees = [tree_of(Question(f"q{i}", "?", "7"), ["{7}", "{8}"]) for i in range(3)]
    work = scorer.begin(trees[0])
    assert work is not None
    asyncio.run(work)
    assert [tree.rewards[0].total for tree in scorer.score(trees)] == [1.0] * 3
    assert sorted(asked) == ["q0", "q0", "q1", "q1", "q2", "q2"]


def test_another_tree_of_the_same_question_is_judged_anew() -> None:
    judge, asked = judge_of(1)
    scorer, answers = scorer_of(ToyTask(judge)), (["{7}", "{8}"], ["{8}", "{7}"])
    begun, other = (tree_of(QUESTION, each) for each in answers)
    work = scorer.begin(begun)
    assert work is not None
    asyncio.run(work)
    [scored] = scorer.score([other])
    assert scored.tree is other
    assert [reward.total for reward in scored.rewards] == [0.0, 1.0]
    assert asked == ["q1"] * 4


def test_what_score_runs_it_runs_at_once() -> None:
    judge, _ = judge_of(6)
    trees = [tree_of(Question(f"q{i}", "?", "7"), ["{7}", "{8}"]) for i in range(3)]
    assert [tree.rewards[0].total for tree in scorer_of(ToyTask(judge)).score(trees)] == [1.0] * 3


def test_a_judge_that_fails() -> None:
    async def broken(question: Question, response: Response) -> float:
        raise ConnectionError("no judge")

    scorer, tree = scorer_of(ToyTask(broken)), tree_of(QUESTION, ["{7}"])
    work = scorer.begin(tree)
    assert work is not None
    for attempt in (lambda: asyncio.run(work), lambda: scorer.score([tree])):
        with pytest.raises(RewardError, match="reward broken, question 'q1', path 0: ConnectionError: no judge"):
            attempt()


def test_nothing_runs_on_after_an_error() -> None:
    done: list[str] = []

    async def uneven(question: Question, response: Response) -> float:
        if response.answer == "7":
            raise ConnectionError("no judge")
        await asyncio.sleep(0.05)
        done.append("8")
        return 1.0

    async def other(question: Question, response: Response) -> float:
        await asyncio.sleep(0.15)
        done.append("other")
        return 1.0

    async def rollout() -> None:
        work = scorer_of(ToyTask(uneven, other)).begin(tree_of(QUESTION, ["{7}", "{8}"]))
        assert work is not None
        with pytest.raises(RewardError, match="no judge"):
            await work
        assert sorted(done) == ["8", "other", "other"]

    asyncio.run(rollout())


def test_an_outcome_is_used_once() -> None:
    calls: list[str] = []

    async def counted(question: Question, response: Response) -> float:
        calls.append(question.id)
        return 1.0

    scorer, tree = scorer_of(ToyTask(counted)), tree_of(QUESTION, ["{7}"])
    scorer.score([tree])
    scorer.score([tree])
    assert len(calls) == 2  # nothing of the last batch is kept


def test_functions_that_do_not_wait_begin_nothing() -> None:
    assert scorer_of(ToyTask(right)).begin(tree_of(QUESTION, ["{7}"])) is None


def test_functions_of_one_name() -> None:
    def other() -> Callable[..., RewardValue]:
        def right(question: Question, response: Response) -> float:
            return 2.0

        return right

    same = other()
    with pytest.raises(ValueError, match=r"functions of different names, got 'test_scoring\.right' twice"):
        scorer_of(ToyTask(right, same))
    same.__module__ = "elsewhere"
    [scored] = scorer_of(ToyTask(right, same)).score([tree_of(QUESTION, ["{7}"])])
    assert scored.rewards[0].components.keys() >= {"test_scoring.right", "elsewhere.right"}


@pytest.mark.parametrize("weight", [float("nan"), "1", True, None])
def test_weights_are_numbers(weight: Any) -> None:
    with pytest.raises(ValueError, match=r"task.rewards, right: expected a finite number as its weight"):
        scorer_of(ToyTask(weights={right: weight}))


def test_a_column_that_is_missing_is_found_before_the_first_step() -> None:
    def of_columns(completions: list[str], solutions: list[str]) -> list[float]:
        return [0.0 for _ in completions]

    task = ToyTask(of_columns)
    task.train = [QUESTION]
    with pytest.raises(ValueError, match="reward of_columns, question 'q1': its parameter 'solutions' is no column"):
        scorer_of(task)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda completions: [1.0], "expected a list of 2 numbers or None, one per completion, got 1 values"),
        (lambda question, response: response.answer["x"], "TypeError"),
        (lambda question, response: "good", "expected a number or None, got str 'good'"),
    ],
)
def test_a_function_is_tried_on_empty_answers(function: Callable[..., Any], expected: str) -> None:
    with pytest.raises(RewardError, match="tried at the start, on two empty answers") as caught:
        scorer_of(ToyTask(function)).try_out(QUESTION)
    assert expected in str(caught.value)


def test_judges_are_not_tried() -> None:
    async def judge(question: Question, response: Response) -> float:
        raise AssertionError("it was asked")

    scorer_of(ToyTask(judge, right)).try_out(QUESTION)


def named(name: str, value: Any) -> Callable[..., Any]:
    def function(question: Question, response: Response) -> Any:
        return value

    function.__name__ = name
    return function


@pytest.mark.parametrize("name", ["mean", "std", "format", "tool_calls"])
def test_functions_with_names_of_the_metrics_are_refused(name: str) -> None:
    expected = f"task.rewards: expected another name than '{name}' for a function of test_scoring, reward.{name} is"
    with pytest.raises(ValueError, match=expected):
        scorer_of(ToyTask(named(name, 1.0)))


def test_our_own_format_reward_has_its_name() -> None:
    [scored] = Scorer(make_rewards({"format": 1.0}), CharacterFormat()).score([tree_of(QUESTION, ["{7}"])])
    assert scored.rewards[0].components == {"format": 1.0, "tool_calls": 1.0}


@pytest.mark.parametrize("value", [Reward(1.0, {"std": 1.0}, True), Reward(1.0, {"mean": 1.0}, True)])
def test_components_with_names_of_the_metrics_are_refused(value: Reward) -> None:
    [name] = value.components
    expected = f"reward own, question 'q1', path 0: expected another name for its component '{name}', reward.{name} is"
    scorer = Scorer({named("own", value): 1.0}, CharacterFormat())
    with pytest.raises(RewardError, match=expected):
        scorer.score([tree_of(QUESTION, ["{7}"])])
    with pytest.raises(RewardError, match="expected another name for its component"):
        scorer.try_out(QUESTION)
    two = Scorer({named("own", value): 1.0, right: 1.0}, CharacterFormat())
    assert f"own.{name}" in two.score([tree_of(QUESTION, ["{7}"])])[0].rewards[0].components


def test_a_component_does_not_replace_the_functions_value() -> None:
    def own(solution_str: str) -> dict[str, float]:
        return {"score": 1.0, "own": 0.25}

    with pytest.raises(
        RewardError, match=r"reward own, question 'q1', path 0: .* component 'own', reward.own is logged"
    ):
        Scorer({own: 1.0}, CharacterFormat()).score([tree_of(QUESTION, ["{7}"])])


def test_a_weighted_sum_that_is_not_finite_names_the_functions() -> None:
    expected = r"question 'q1', path 0: expected a finite weighted sum .*, got 100 \* 1e\+308 \(huge\) = inf"
    with pytest.raises(RewardError, match=expected):
        Scorer({named("huge", 1e308): 100.0}, CharacterFormat()).score([tree_of(QUESTION, ["{7}"])])


def test_the_first_function_decides_success_whatever_its_name() -> None:
    scorer = Scorer({named("zero", 0.0): 1.0, named("alpha", 1.0): 1.0}, CharacterFormat())
    [scored] = scorer.score([tree_of(QUESTION, ["{7}"])])
    assert (scored.rewards[0].total, scored.rewards[0].success) == (1.0, False)


def test_what_two_judges_say_is_kept_apart() -> None:
    """Also where the order of the functions is not that of their names."""

    async def seven(question: Question, response: Response) -> float:
        return float(response.answer == "7")

    async def always(question: Question, response: Response) -> float:
        return 0.25

    [scored] = scorer_of(ToyTask(seven, always)).score([tree_of(QUESTION, ["{7}", "{8}"])])
    assert [(r.components["seven"], r.components["always"], r.success) for r in scored.rewards] == [
        (1.0, 0.25, True),
        (0.0, 0.25, False),
    ]
