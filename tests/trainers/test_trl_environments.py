"""A branch's environment is in the state of the path that it left, or there is no branch: with the real TRL."""

import asyncio
import copy
import itertools

import pytest
from calling_toys import ForkedWalk, Recorder, Walk, make_calling_trainer

from aepo.branching import BranchSettings
from aepo.integrations.trl.branching.rollout import BranchingTrainer

OFTEN = {"branch_alpha": 0.9, "branch_gamma": 0.0, "branch_penalty": 0.0}


class Branching(Recorder, BranchingTrainer):
    pass


def branching(folder, environment, rule=None, *, tools=("step",), own=(), rows=8, call=0.9, **changed):
    trainer = make_calling_trainer(
        Branching,
        folder,
        tools=tools,
        own={"environment_factory": environment, **dict(own)},
        model={"call": call},
        per_device_train_batch_size=rows,
        num_generations=8,
        # So that every result fits: a call whose result does not is in the environment, but not in the completion.
        max_completion_length=600,
        **changed,
    )
    trainer.branch_with(BranchSettings(**(OFTEN if rule is None else rule)))
    return trainer


class AsyncWalk(Walk):
    """Its step and its fork are coroutines."""

    async def step(self, to: int) -> str:
        """Go there; 9 is a wall.

        Args:
            to: where
        """
        await asyncio.sleep(0.001)
        return Walk.step(self, to)

    async def fork(self):
        await asyncio.sleep(0)
        return copy.deepcopy(self)


def expected(batch, row):
    """What the walk says and where it ends, had the completion's calls been alone."""
    walk = Walk()
    walk.reset(start=batch.examples[row]["start"])
    said = []
    for call in batch.calls(row):
        try:
            said.append(walk.step(int(call["arguments"]["to"])))
        except ValueError as error:
            said.append(str({"error": str(error)}))
    return said, walk.path


@pytest.mark.parametrize("rule", [{**OFTEN, "fresh_paths": 2}, OFTEN])
@pytest.mark.parametrize("environment", [Walk, ForkedWalk, AsyncWalk])
def test_every_path_is_as_if_it_had_been_alone(tmp_path, environment, rule):
    trainer = branching(tmp_path, environment, rule)
    branches = 0
    for seed in range(4):
        batch = trainer.sample(seed)
        for row in range(8):
            said, path = expected(batch, row)
            assert batch.results(row) == said
            assert trainer.environments[row].path == path
        assert len({id(one) for one in trainer.environments}) == 8
        assert batch.metrics["rollout/refused_branches"] == 0
        branches += batch.metrics["rollout/branches"]
        forked = [one for one in trainer.environments if one not in trainer._environment_pool[None]]
        assert len(forked) == (0 if environment is Walk else batch.metrics["rollout/branches"])
    assert branches >= 4
    assert len(trainer._environment_pool[None]) == 8  # TRL's own, reset for every batch


def test_branches_from_states_that_the_first_path_has_left(tmp_path):
    """With pre-monitoring its places are judged after its end: a fork was kept at each."""
    trainer = branching(tmp_path, ForkedWalk, call=0.97)
    left = 0
    for seed in range(3):
        batch = trainer.sample(seed)
        first = batch.completion_ids[0]
        for row in range(1, 8):
            pairs = zip(first, batch.completion_ids[row], strict=False)
            shared = len([*itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)])
            left += 0 < batch.mask[row][:shared].count(0) < batch.mask[0].count(0)
            assert (batch.results(row), trainer.environments[row].path) == expected(batch, row)
    assert left


class Moody(Walk):
    """Says something else whenever it is asked, so that nothing can be repeated; `reset` is the same every time."""

    said = itertools.count()

    def step(self, to: int) -> str:
        """Go there.

        Args:
            to: where
        """
        self.path.append(to)
        return f"at {self.path} for the {next(self.said)}th time"


class Restless(Moody):
    """And begins elsewhere from its second reset in a batch on."""

    def reset(self, start: int = 0, **_) -> str:
        self.path = [start]
        self.resets = getattr(self, "resets", 0) + 1
        return "" if self.resets == 1 else f"again {next(self.said)}"


def test_what_cannot_be_repeated_is_no_branch(tmp_path):
    """The row's environment is reset before it is used again: no call of another path is left in it."""
    trainer = branching(tmp_path, Moody, {**OFTEN, "fresh_paths": 2})
    with pytest.warns(RuntimeWarning, match=r"no branch: Moody\.step gave another result when it was repeated: 'at "):
        batch = trainer.sample()
    assert batch.metrics["rollout/branches"] == 0
    assert batch.metrics["rollout/refused_branches"] > 0
    for row, environment in enumerate(trainer.environments):
        start = batch.examples[row]["start"]
        assert environment.path == [start, *(int(call["arguments"]["to"]) for call in batch.calls(row))]
    assert len({environment.path[0] for environment in trainer.environments}) == 1
    assert len(batch.prompt_ids) == 8
    assert batch.prompt_ids == batch.prompt_ids[:1] * 8


def test_a_row_whose_second_reset_says_something_else_has_that_prompt(tmp_path):
    """In its tokens, and in what reward functions get."""
    store = []
    trainer = branching(
        tmp_path,
        Restless,
        {**OFTEN, "fresh_paths": 2},
        rewards=lambda prompts, completions, **_: store.extend(prompts) or [0.0] * len(prompts),
    )
    with pytest.warns(RuntimeWarning, match="no branch: Restless"):
        batch = trainer.sample()
    texts = [trainer._tokenizer.decode(tokens) for tokens in batch.prompt_ids]
    again = [row for row, text in enumerate(texts) if "again" in text]
    assert again
    for row, (text, prompt) in enumerate(zip(texts, store, strict=True)):
        start = batch.examples[row]["start"]
        assert ("again" in prompt[-1]["content"]) == (row in again)
        assert f"{prompt[-1]['content']}<|im_end|>" in text
        assert prompt[-1]["content"].startswith(f"go {start}")
    assert batch.metrics["rollout/branches"] == 0


class Elsewhere(Walk):
    """Begins at random, and says where."""

    places = itertools.count()

    def reset(self, **_) -> str:
        self.path = [next(self.places)]
        return f" from {self.path}"


def test_rows_with_other_prompts_never_share(tmp_path):
    trainer = branching(tmp_path, Elsewhere)
    batch = trainer.sample()
    assert len({tuple(tokens) for tokens in batch.prompt_ids}) == 8
    assert (batch.metrics["rollout/branches"], batch.metrics["rollout/refused_branches"]) == (0, 0)
    assert batch.metrics["rollout/fresh_paths"] == 1  # of every group of one row
    assert all(environment in trainer._environment_pool[None] for environment in trainer.environments)


class Failing(Walk):
    def fork(self):
        raise OSError("no room")


class Same(Walk):
    def fork(self):
        return self


@pytest.mark.parametrize(
    ("environment", "text"),
    [(Failing, "Failing.fork raised OSError: no room"), (Same, "Same.fork returned .*: expected another Same")],
)
@pytest.mark.parametrize("fresh", [None, 2])
def test_a_fork_that_fails_is_no_branch(tmp_path, environment, text, fresh):
    trainer = branching(tmp_path, environment, {**OFTEN, "fresh_paths": fresh}, call=0.97)
    with pytest.warns(RuntimeWarning, match=f"no branch: {text}"):
        batch = trainer.sample()
    assert batch.metrics["rollout/branches"] == 0
    assert batch.metrics["rollout/refused_branches"] > 0
    for row in range(8):
        assert (batch.results(row), trainer.environments[row].path) == expected(batch, row)


def test_no_model_is_told_of_fork(tmp_path):
    """TRL would list it in the prompt, or fail for want of a docstring; a model that guesses the name finds no tool."""
    trainer = branching(tmp_path, ForkedWalk, tools=["fork"], own={"eval_dataset": None})
    batch = trainer.sample()
    assert [tool.__name__ for tool in trainer.tools] == ["step"]
    assert '"name": "step"' in trainer._tokenizer.decode(batch.prompt_ids[0]).replace('{"to"', "")
    assert "fork" not in trainer._tokenizer.decode(batch.prompt_ids[0])
    assert {result for row in range(8) for result in batch.results(row)} == {"{'error': 'Tool fork not found.'}"}


called = []


def note(to: int) -> str:
    """Write it down.

    Args:
        to: what
    """
    called.append(to)
    return f"noted {to}"


def test_standalone_tools_are_not_called_again(tmp_path):
    """A branch reads what its parent's call returned; only the environment's own calls are repeated."""
    called.clear()
    trainer = branching(tmp_path, Walk, {**OFTEN, "fresh_paths": 2}, tools=["step", "note"], own={"tools": [note]})
    batch = trainer.sample(1)
    assert batch.metrics["rollout/branches"] > 0
    in_completions = [result for row in range(8) for result in batch.results(row) if result.startswith("noted")]
    sampled = sum(trainer._tokenizer.decode(segment).count('"note"') for _, segment in batch.segments)
    assert len(in_completions) > len(called) > 0
    assert len(called) <= sampled
    for row in range(8):
        steps = [int(call["arguments"]["to"]) for call in batch.calls(row) if call["name"] == "step"]
        assert trainer.environments[row].path == [batch.examples[row]["start"], *(to for to in steps if to != 9)]


class Scored(ForkedWalk):
    def get_reward(self) -> float:
        return float("".join(map(str, self.path)))


def test_rewards_are_those_of_the_forks(tmp_path):
    trainer = branching(tmp_path, Scored, {**OFTEN, "fresh_paths": 2}, rewards=[])
    batch = trainer.sample(1)
    assert batch.metrics["rollout/branches"] > 0
    rewards = [float("".join(map(str, expected(batch, row)[1]))) for row in range(8)]
    assert batch.metrics["rewards/Scored/mean"] == pytest.approx(sum(rewards) / 8)


class Git(Walk):
    def fork(self, to: int) -> str:
        """Copy a repository.

        Args:
            to: where
        """
        return f"forked to {to}"


def test_a_fork_that_takes_arguments_is_a_tool(tmp_path):
    """Of the environment's own: branches repeat its calls, as they do those of any other tool."""
    trainer = branching(tmp_path, Git, {**OFTEN, "fresh_paths": 2}, tools=["fork"])
    batch = trainer.sample()
    assert [tool.__name__ for tool in trainer.tools] == ["fork", "step"]
    assert batch.metrics["rollout/branches"] > 0
    assert batch.metrics["rollout/refused_branches"] == 0
    assert all(result.startswith("forked to") for row in range(8) for result in batch.results(row))


class Cached(Walk):
    """Its fork is one copy for everybody."""

    copy: Walk | None = None

    def fork(self):
        Cached.copy = Cached.copy or copy.deepcopy(self)
        return Cached.copy


def test_an_instance_is_taken_once(tmp_path):
    Cached.copy = None
    trainer = branching(tmp_path, Cached, {**OFTEN, "fresh_paths": 2}, call=0.97)
    with pytest.warns(RuntimeWarning, match=r"no branch: Cached.fork returned .*: expected another Cached"):
        batch = trainer.sample()
    assert batch.metrics["rollout/branches"] <= 1
    assert len({id(one) for one in trainer.environments}) == 8


class Once(Walk):
    """Its steps cannot be repeated, and it cannot be reset twice."""

    def reset(self, start: int = 0, **_) -> None:
        if getattr(self, "path", None):
            raise ConnectionError("gone")
        Walk.reset(self, start)

    def step(self, to: int) -> str:
        """Go there.

        Args:
            to: where
        """
        return f"{Walk.step(self, to)} {next(NUMBERS)}"


NUMBERS = itertools.count()


def test_an_environment_that_cannot_be_reset_again_is_named(tmp_path):
    trainer = branching(tmp_path, Once, {**OFTEN, "fresh_paths": 2}, call=0.97)
    with (
        pytest.warns(RuntimeWarning, match="no branch"),
        pytest.raises(RuntimeError, match=r"Once.reset raised ConnectionError when it was called again"),
    ):
        trainer.sample()
