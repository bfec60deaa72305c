"""Branched rollouts at their edges: what is cut or does not fit, rows of other ranks, environments of several kinds."""

import itertools

import pytest
from calling_toys import Recorder, Walk, make_calling_trainer, questions, step

from aepo.branching import BranchSettings
from aepo.integrations.trl.branching import waves
from aepo.integrations.trl.branching.environments import Environments
from aepo.integrations.trl.branching.paths import Path
from aepo.integrations.trl.branching.rollout import BranchedRollout, BranchingTrainer
from aepo.integrations.trl.branching.tools import Result
from aepo.integrations.trl.branching.waves import Waves, max_positions

ALWAYS = {"branch_alpha": 0.9, "branch_gamma": 0.0, "branch_penalty": 0.0}
ROWS = {"per_device_train_batch_size": 8, "num_generations": 8}


class Branching(Recorder, BranchingTrainer):
    pass


def branching(folder, rule, trainer=Branching, **changed):
    made = make_calling_trainer(trainer, folder, **changed)
    made.branch_with(BranchSettings(**rule))
    return made


class Told(Branching):
    """With log-probs of an engine, which says the token itself."""

    def _generate_single_turn(self, *args, **kwargs):
        tokens, _ = super()._generate_single_turn(*args, **kwargs)
        return tokens, [[-token / 1000 for token in segment] for segment in tokens]


def test_logprobs_are_cut_where_tokens_are(tmp_path):
    """An engine writes max_completion_length tokens in every turn: what has no room is dropped with its log-probs."""
    rule, model = {**ALWAYS, "fresh_paths": 4}, {"call": 0.95, "again": 0.9}
    trainer = branching(tmp_path, rule, Told, own={"tools": [step]}, model=model, max_completion_length=60, **ROWS)
    batch = trainer.sample()
    cut = 0
    for tokens, mask, logprobs in zip(batch.completion_ids, batch.mask, batch.logprobs, strict=True):
        assert logprobs == [-token / 1000 if own else 0.0 for token, own in zip(tokens, mask, strict=True)]
        cut += len(tokens) == 60 and 0 in mask
    assert cut, "no second turn was cut"


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    trainer = branching(tmp_path_factory.mktemp("sampled"), {**ALWAYS, "fresh_paths": 3}, own={"tools": [step]}, **ROWS)
    trainer.sample()
    return trainer


@pytest.mark.parametrize("over", [0, 1])
def test_results_may_use_up_a_completion_but_not_the_positions_of_the_model(over, sampled):
    """As in TRL: a completion of exactly max_completion_length is one, a sequence of as many tokens as the model has
    positions leaves none to write."""
    result = Result({"type": "function", "function": {"name": "step", "arguments": {"to": 1}}}, "step", "at 1", False)
    results = len(sampled._get_tool_suffix_ids([result.message]))
    one = Waves(sampled, Environments(sampled, sampled.generated, []), [], 20)

    def fits(prompt, written):
        path = Path(0, [7] * prompt)
        path.add_segment([8] * written, None, {"role": "assistant", "content": ""})
        read = one._read(path, [result])
        assert len(path.completion) == written + read * results
        assert (path.rounds, path.calls) == (1, 1)
        return read

    longest = sampled.max_completion_length
    assert fits(5, longest - results + over) == (not over)
    assert fits(max_positions(sampled) - results - 10 - 1 + over, 10) == (not over)


class OfRank:
    """A trainer as a process of another number has it."""

    def __init__(self, inner, process_index):
        self._inner, self.process_index = inner, process_index

    @property
    def accelerator(self):
        return self

    def __getattr__(self, name):
        return getattr(self._inner if hasattr(self._inner, name) else self._inner.accelerator, name)


@pytest.mark.parametrize(("rank", "fresh"), [(0, [7, 2]), (1, [6, 4])])
def test_groups_of_a_rank_begin_where_the_rank_before_ends(rank, fresh, sampled):
    """10 rows each, 8 completions per prompt, 7 of them fresh: rank 1 begins with the third of its first prompt."""
    prompts = [[{"role": "user", "content": "go"}]] * 10
    for name in ("_sync_tool_dicts", "_async_tool_dicts"):
        setattr(sampled, name, [getattr(sampled, name)[0]] * 10)
    rollout = BranchedRollout(BranchSettings(**ALWAYS, fresh_paths=7), [])
    rollout(prompts, OfRank(sampled, rank))
    assert sampled._metrics["train"]["rollout/fresh_paths"][-1] == sum(fresh) / 2


class Jumps(Walk):
    """Another kind, with another tool."""

    step = None

    def jump(self, to: int) -> str:
        """Be there.

        Args:
            to: where
        """
        self.path.append(to)
        return f"now {self.path}"


class Moody(Walk):
    """Cannot be repeated. Its reset takes the columns of the dataset, and says what `said` has."""

    said = None
    times = itertools.count()

    def reset(self, *, prompt, start) -> None:
        self.path = [start]
        return self.said

    def step(self, to: int) -> str:
        """Go there.

        Args:
            to: where
        """
        self.path.append(to)
        return f"at {self.path} for the {next(self.times)}th time"


def test_several_kinds_of_environment(tmp_path, monkeypatch):
    """Each row has the tools of its kind alone; the column that names the kind is not for `reset`."""
    kinds = {"moody": Moody, "jumps": Jumps}
    rows = [row | {"environment": name} for row, name in zip(questions(2), kinds, strict=True)]
    told = []

    def parse(tokenizer, segment, *, prefix, tools):
        told.append((tokenizer.decode(prefix), [tool.__name__ for tool in tools]))
        return parsed(tokenizer, segment, prefix=prefix, tools=tools)

    parsed = waves.parse_response
    monkeypatch.setattr(waves, "parse_response", parse)
    trainer = branching(
        tmp_path,
        {**ALWAYS, "fresh_paths": 2},
        tools=["step", "jump"],
        own={"environment_factory": kinds, "train_dataset": type(questions()).from_list(rows)},
        model={"call": 0.97},
        per_device_train_batch_size=16,
        num_generations=8,
        max_completion_length=600,
    )
    with pytest.warns(RuntimeWarning, match=r"no branch: Moody\.step gave another result"):
        batch = trainer.sample()
    for example, environment, results in zip(
        batch.examples, trainer.environments, map(batch.results, range(16)), strict=True
    ):
        kind = example["environment"]
        assert type(environment) is kinds[kind]
        own, other = ("at ", "Tool jump not") if kind == "moody" else ("now ", "Tool step not")
        assert all(own in result or other in result for result in results)
        assert environment.path[0] == example["start"]
    assert {tuple(names) for text, names in told if "go 0" in text} == {("step",)}
    assert {tuple(names) for text, names in told if "go 1" in text} == {("jump",)}


@pytest.mark.parametrize("said", [" as before", [{"type": "text", "text": " as before"}]])
@pytest.mark.parametrize("asked", ["go", [{"type": "text", "text": "go"}]])
def test_what_a_second_reset_says_stands_where_trl_puts_it(tmp_path, monkeypatch, said, asked):
    """Texts and content blocks: a prompt that is the same again is known as the same."""
    monkeypatch.setattr(Moody, "said", said)
    resets, reset, store = [], Environments._reset, []
    monkeypatch.setattr(Environments, "_reset", lambda self, row: resets.append(row) or reset(self, row))
    rows = [{"prompt": [{"role": "user", "content": asked}], "start": 1}]
    trainer = branching(
        tmp_path,
        {**ALWAYS, "fresh_paths": 2},
        own={"environment_factory": Moody, "train_dataset": type(questions()).from_list(rows)},
        model={"call": 0.97},
        rewards=lambda prompts, completions, **_: store.extend(prompts) or [0.0] * len(prompts),
        max_completion_length=600,
        **ROWS,
    )
    with pytest.warns(RuntimeWarning, match="no branch") as warned:
        trainer.sample()
    assert resets
    assert not [one for one in warned if "said something else" in str(one.message)]
    assert store == store[:1] * 8
