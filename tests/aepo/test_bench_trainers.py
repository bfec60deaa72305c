"""Claims about `aepo bench trainers`: the made-up paths share what they say; the float64 gradient is a derivative of
the objective; every trainer makes that gradient, and one that does not gets no row; processes report time and memory
of their own updates, and a dead one is a line; settings that are not measured are refused.
"""

import dataclasses
import itertools
import os
import signal

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from aepo import cli
from aepo.bench import trainer_rows, trainers
from aepo.bench.progress import Progress
from aepo.bench.settings import Settings
from aepo.bench.trainer_process import SMALL, Ready, TrainerProcess, Update
from aepo.bench.trainer_rows import (
    AEPO,
    COMPETITORS,
    GRPO,
    OWN,
    TRL,
    TRL_PATCHED,
    Cell,
    distinct_positions,
    gradient_error,
    make_paths,
    true_gradients,
)

pytest.importorskip("trl")
TINY = dataclasses.replace(SMALL, vocab=40, hidden=64, layers=1)


# The paths


def shared(one, other):
    """Tokens of the prefix that two paths share."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one.tokens, other.tokens)))  # noqa: B905


def test_a_branch_copies_a_path_up_to_a_tool_result():
    cell = Cell(questions=2, vocab=32000)
    paths = make_paths(cell)
    assert [path.question for path in paths] == [0] * 8 + [1] * 8
    assert {len(path.tokens) for path in paths} == {448}
    assert sum(sum(path.generated) for path in paths) == cell.trained == 2048
    turn = 32 + 64
    for first in (0, 8):
        branches = [shared(paths[first + index], paths[first + index - 4]) for index in range(4, 8)]
        assert branches == [128 + turns * turn for turns in (2, 3, 1, 2)]
        assert {shared(paths[first], paths[first + index]) for index in (1, 2, 3)} == {128}
    kept = 2 * (2 + 3 + 1 + 2) * turn
    assert distinct_positions(paths) == cell.positions - 2 * 7 * 128 - kept


def test_apart_they_share_the_prompt_alone():
    cell = Cell(questions=2, vocab=32000, branched=False)
    paths = make_paths(cell)
    assert distinct_positions(paths) == cell.positions - 2 * 7 * 128
    assert shared(paths[0], paths[8]) == 0


def test_the_model_wrote_turns_and_read_results_between_them():
    path = make_paths(Cell(questions=1, vocab=9, prompt=2, written=1, read=2, turns=3))[0]
    assert path.generated == (False,) * 2 + (True, False, False) * 2 + (True,)
    assert min(path.tokens) >= 2  # no padding, no end


def test_advantages_are_those_of_the_question():
    paths = make_paths(TINY)
    for first in (0, 8):
        rewards = torch.tensor([path.reward for path in paths[first : first + 8]], dtype=torch.float64)
        expected = (rewards - rewards.mean()) / rewards.std()
        torch.testing.assert_close([path.advantage for path in paths[first : first + 8]], expected.tolist())
        assert rewards.std() > 50  # or TRL's 1e-4 beside it would show


# The gradient


def value(model, paths, objective, start):
    """The objective, from one batch of logits: `start` are log-probs and entropies where r is 1."""
    ids = torch.tensor([path.tokens for path in paths])
    written = torch.tensor([path.generated for path in paths])[:, 1:]
    log_p = torch.log_softmax(model(input_ids=ids).logits[:, :-1], dim=-1)
    logprobs = log_p.gather(-1, ids[:, 1:, None])[..., 0][written]
    entropy = torch.distributions.Categorical(logits=log_p).entropy()[written]
    old, old_entropy = (logprobs, entropy) if start is None else start
    advantages = torch.tensor([path.advantage for path in paths]).double().repeat_interleave(int(written[0].sum()))
    if objective == AEPO:
        advantages = advantages * (1 + 0.2 * (old_entropy - old_entropy.mean()) / old_entropy.std())
    return (-advantages * (logprobs - old).exp()).mean(), (old, old_entropy)


@pytest.mark.parametrize("objective", [GRPO, AEPO])
def test_the_true_gradient_is_a_derivative(objective):
    """Of the objective along a random direction, by central differences."""
    model, paths = TINY.model(), make_paths(TINY)
    gradients = true_gradients(model, paths, objective)
    model.double()
    torch.manual_seed(1)
    parameters = dict(model.named_parameters())
    assert gradients.keys() == parameters.keys()
    direction = {name: torch.randn_like(one) for name, one in parameters.items()}
    expected = sum((gradients[name] * direction[name]).sum() for name in parameters).item()
    step = 1e-4
    with torch.no_grad():
        _, start = value(model, paths, objective, None)
        found = []
        for sign in (1, -2, 1):  # there, to the other side, and back
            for name, one in parameters.items():
                one.add_(direction[name], alpha=sign * step)
            found.append(value(model, paths, objective, start)[0].item())
    # At this step what is of third order is 3e-4, and so is the rounding of norms.
    assert (found[0] - found[1]) / (2 * step) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("competitor", COMPETITORS, ids=str)
def test_every_trainer_makes_that_gradient_and_not_the_other_objectives(competitor):
    from aepo.bench.trainer_steps import TRAINERS, OneUpdate
    from aepo.integrations.trl import unpatch_trl

    model, paths = SMALL.model(), make_paths(SMALL)
    truths = {objective: true_gradients(model, paths, objective) for objective in (GRPO, AEPO)}
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    meter = OneUpdate(model)
    try:
        TRAINERS[competitor](SMALL, model, meter)
    finally:
        unpatch_trl()
    truth = truths.pop(competitor.objective)
    assert gradient_error(meter.gradients, truth) <= trainers.TOLERANCE
    (other,) = truths.values()
    assert gradient_error(meter.gradients, other) > 1000 * trainers.TOLERANCE
    assert all(not torch.equal(before[name], one) for name, one in model.named_parameters())  # AdamW's step is in it


def test_a_missing_or_nan_gradient_is_an_infinite_error():
    truth = {"a": torch.ones(2).double(), "b": torch.tensor([3.0, 4.0]).double()}
    assert gradient_error({"a": torch.ones(2), "b": torch.tensor([3.0, 4.5])}, truth) == pytest.approx(0.1)
    assert gradient_error({"a": torch.ones(2)}, truth) == float("inf")
    assert gradient_error({"a": torch.ones(2), "b": torch.tensor([3.0, float("nan")])}, truth) == float("inf")


def test_trl_gets_the_paths_of_its_prompts_in_any_order():
    from aepo.bench.trainer_steps import _rollout

    paths = make_paths(TINY)
    given = _rollout(paths, 8, ["1", "0"] * 8, None)
    expected = [path for pair in zip(paths[8:], paths[:8], strict=True) for path in pair]
    assert given["completion_ids"] == [list(path.completion) for path in expected]
    assert given["given_reward"] == [path.reward for path in expected]
    assert given["env_mask"] == [list(map(int, path.written)) for path in expected]


# Processes and rows


def measured(rounds=2):
    with Progress(Console(quiet=True)) as progress:
        return trainers.measure(TINY, rounds, 1, progress)


def test_processes_take_turns_and_report_their_own_updates(monkeypatch):
    monkeypatch.setattr(trainers, "COMPETITORS", (TRL, OWN))
    rows, refused = measured()
    assert refused == []
    assert [(row.trainer, row.objective, row.rounds) for row in rows] == [
        ("TRL", GRPO, 2),
        ("aepo's trainer", GRPO, 2),
    ]
    weights = sum(one.numel() for one in TINY.model().parameters())
    for row in rows:
        assert row.cpu_seconds > 0
        assert 0 < row.seconds < 60
        assert 0 < row.gradient_error <= trainers.TOLERANCE
        assert row.peak_bytes > 3 * 4 * weights  # a weight and AdamW's two numbers are kept
        assert row.memory_of_trl == row.peak_bytes / rows[0].peak_bytes


def test_a_wrong_trainer_has_no_row(monkeypatch):
    monkeypatch.setattr(trainers, "COMPETITORS", (OWN,))
    monkeypatch.setattr(trainers, "TOLERANCE", 1e-9)  # float32 cannot
    rows, (refusal,) = measured()
    assert rows == []
    assert refusal.provider == "aepo's trainer, GRPO"
    assert "wrong: gradient error" in refusal.reason


def test_a_process_that_dies_is_a_line():
    with TrainerProcess(OWN, TINY, 1) as process:
        process.ready()
        os.kill(process._process.pid, signal.SIGKILL)
        process._process.join()
        with pytest.raises(RuntimeError, match="its process ended with exit code -9"):
            process.update()


class Recorded:
    """A process whose updates are known."""

    gradient_error = 1e-6

    def __init__(self, *seconds, peak=100):
        self.updates = [Update(one, 2 * one, peak, 0.5) for one in seconds]


class Slow:
    """A process whose first update takes longer than the others."""

    def __init__(self):
        self.seconds = iter((9.0, 1.0, 2.0))

    def ready(self):
        return Ready(1e-6)

    def update(self):
        return Update(next(self.seconds), 1.0, None, None)


def test_the_first_update_is_not_counted():
    contestant = trainers._Contestant(OWN, Slow())
    contestant.start()
    contestant.update()
    assert [update.seconds for update in contestant.updates] == [1.0]
    assert contestant.wants_round(2)
    contestant.update()
    assert not contestant.wants_round(2)


def test_rows_are_medians_beside_trl():
    one, other, wild = Recorded(4.0, 4.2, 4.1), Recorded(2.05, 9.0, 2.0, peak=50), Recorded(1.0, 3.0)
    for recorded, competitor in ((one, TRL), (other, OWN), (wild, TRL_PATCHED)):
        recorded.competitor = competitor
    rows = trainers.rows_of(TINY, [one, wild])
    assert (rows[0].seconds, rows[0].cpu_seconds, rows[0].time_of_trl) == (4.1, 8.2, 1.0)
    assert rows[1].spread == pytest.approx(0.5)  # quartiles 1.5 and 2.5
    assert rows[1].time_of_trl is None  # unsteady
    other.updates.pop(1)
    row = trainers.rows_of(TINY, [one, other])[1]
    assert (row.time_of_trl, row.memory_of_trl) == (pytest.approx(2.025 / 4.1), 0.5)
    assert trainers.rows_of(TINY, [other])[0].time_of_trl is None  # TRL has no row
    assert row.distinct == distinct_positions(make_paths(TINY))


# Settings


def test_default_cells():
    cells = trainers.chosen_cells(Settings(device="cpu"))
    assert [(cell.trained, cell.vocab, cell.branched) for cell in cells] == [
        (2048, 32000, False),
        (2048, 32000, True),
        (2048, 151936, True),
        (8192, 32000, True),
    ]
    asked = trainers.chosen_cells(Settings(device="cpu", tokens=(1024,), vocab=(500, 600), hidden=128))
    assert [(cell.trained, cell.vocab, cell.hidden) for cell in asked] == [(1024, 500, 128), (1024, 600, 128)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokens", "1000"), "tokens must be a multiple of 1024, those of a question, for trainers; got 1000"),
        (("--dtype", "bfloat16"), "trainers are measured in float32 only; got dtype torch.bfloat16"),
        (("--hidden", "100"), "hidden must be a multiple of 64"),
        (("--vocab", "3"), "vocab must be at least 4 for trainers; got 3"),
        (("linear",), "trainers are measured alone"),
        (("--plot", "x.svg"), "trainers are measured alone"),
    ],
)
def test_what_is_not_measured_is_said(arguments, message):
    done = CliRunner().invoke(cli.app, ["bench", "trainers", "--device", "cpu", *arguments])
    assert done.exit_code != 0
    assert message in " ".join(done.output.split())


def test_vocabularies_leave_room_for_the_two_tokens_that_no_path_has():
    assert trainer_rows.make_paths(dataclasses.replace(TINY, vocab=4))
