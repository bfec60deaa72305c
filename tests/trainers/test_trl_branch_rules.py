"""The rules by which a group of TRL's rows branches, on paths made by hand; and what branching refuses."""

import math
import random

import pytest
from calling_toys import make_calling_trainer, step

from aepo.branching import BranchSettings
from aepo.integrations.trl.branching.paths import Group, Path, Seen, Turn
from aepo.integrations.trl.branching.rollout import BranchedRollout, BranchingTrainer, log_means

ALWAYS = {"branch_alpha": 0.9, "branch_gamma": 0.0, "branch_penalty": 0.0}
RESULTS = [0, 0]


class States:
    """Says what was asked for; branches into the rows of `refused` are refused."""

    def __init__(self, *refused):
        self.refused, self.begun, self.branched = refused, [], []

    def begin(self, row, prompt):
        self.begun.append(row)
        return prompt

    def branch(self, path, place, row):
        self.branched.append((path.row, place.step, row))
        return row not in self.refused


def group(rows=4, fresh=1, states=None, **settings):
    settings = BranchSettings(fresh_paths=fresh, **settings)
    return Group(range(rows), [7, 7, 7], fresh, settings, 4.0, states or States())


def take(group):
    ready, group.ready = group.ready, []
    return ready


def write(path, group, *, root=0.0, entropy=0.0):
    """The next segment, two tokens of the row's number, with its mean entropy; then the rule is asked."""
    path.add_segment([path.row] * 2, [-0.5, -0.5], {"role": "assistant", "content": str(path.row)})
    path.initial_entropy = root
    for place in path.undecided:
        place.entropy = entropy if place.entropy is None else place.entropy
    group.decide(path)


def read(path, group):
    """The results of a call."""
    path.calls, path.rounds = path.calls + 1, path.rounds + 1
    path.add_results(RESULTS, [{"role": "tool", "content": "r"}], Turn((), ()))
    group.ready.append(path)


def end(group, *paths):
    for path in paths:
        group.finish(path)
    group.go_on()


def test_a_fixed_number_starts_at_once_and_the_rest_waits():
    states = States()
    started = take(group(5, fresh=3, states=states))
    assert [path.row for path in started] == states.begun == [0, 1, 2]
    assert all(path.prompt == [7, 7, 7] and path.completion == [] for path in started)


@pytest.mark.parametrize(
    ("root", "tool", "fresh"),
    [(1.0, 1.0, 4), (math.log(3), 0.0, 6), (0.0, math.log(3), 2), (0.0, 99.0, 1), (99.0, 0.0, 8)],  # 1/2, 3/4, 1/4
)
def test_pre_monitoring_counts_the_path_that_went_ahead(root, tool, fresh):
    one = group(8, fresh=None, branch_threshold=2.0)
    [probe] = take(one)
    write(probe, one, root=root)
    read(probe, one)
    [probe] = take(one)
    write(probe, one, root=root, entropy=tool)
    assert one.seen.chances == []  # nothing is decided while its budget is unknown
    end(one, probe)
    assert one.seen.fresh_paths == fresh
    assert [path.row for path in take(one)] == [*range(1, fresh)] or fresh == 1


def test_without_a_tool_result_all_start_fresh():
    one = group(4, fresh=None)
    [probe] = take(one)
    write(probe, one)
    end(one, probe)
    assert (one.seen.fresh_paths, [path.row for path in take(one)]) == (4, [1, 2, 3])


def test_a_branch_has_read_the_same_and_writes_by_itself():
    one = group(4, **ALWAYS)
    [path] = take(one)
    write(path, one)
    read(path, one)
    take(one)
    write(path, one)
    [branch] = take(one)
    assert branch.row == 1
    assert branch.completion == [0, 0, *RESULTS]  # without what the other wrote after the results
    assert branch.mask == [1, 1, 0, 0]
    assert branch.logprobs == [-0.5, -0.5, 0.0, 0.0]
    assert [message["role"] for message in branch.messages] == ["assistant", "tool"]
    assert (branch.calls, branch.first, len(branch.turns), branch.rounds) == (1, 2, 1, 1)
    branch.messages[0]["content"] = "changed"
    assert path.messages[0]["content"] == "0"
    write(branch, one)
    assert len(one.seen.chances) == 1  # not asked about the place that made it
    assert path.completion == [0, 0, *RESULTS, 0, 0]


def test_the_penalty_is_of_the_path_and_ends_with_a_place_that_does_not_branch():
    """0.6 (1 - 0.3 l): a branch, none, a branch; the second path's count is its own."""
    one = group(8, fresh=2, branch_alpha=0.6, branch_gamma=0.0, branch_penalty=0.3)
    paths = take(one)
    for path in paths:
        write(path, one)
    for expected in (0.6, 0.42, 0.6):
        for path in paths:
            read(path, one)
            write(path, one)
        assert one.seen.chances[-2:] == pytest.approx([expected, expected])
    assert one.seen.branches == 4
    branches = [path for path in take(one) if path not in paths]
    assert [(branch.consecutive, len(branch.turns)) for branch in branches] == [(1, 1), (1, 1), (1, 3), (1, 3)]
    read(branches[0], one)
    write(branches[0], one)
    assert one.seen.chances[-1] == pytest.approx(0.42)  # the place at which it left counts for it


def test_the_chance_rises_with_the_entropy_after_the_tool():
    one = group(4, branch_alpha=0.45, branch_gamma=0.2)
    [path] = take(one)
    for entropy in (2.0, 4.0):  # log V is 4, the initial entropy 1
        write(path, one, root=1.0, entropy=entropy)
        read(path, one)
    write(path, one, root=1.0, entropy=4.0)
    assert one.seen.chances == pytest.approx([0.45 + 0.15, (0.45 + 0.15) * 0.95])


def test_alpha_is_drawn_for_every_decision_from_what_the_trainer_seeds():
    random.seed(3)
    expected = [random.random() for _ in range(3)]
    random.seed(3)
    one = group(2, branch_gamma=0.0, branch_threshold=2.0)
    [path] = take(one)
    write(path, one)
    for _ in expected:
        read(path, one)
        write(path, one)
    assert one.seen.chances == expected


def test_no_more_branches_than_rows_and_what_is_left_starts_fresh():
    one = group(2, **ALWAYS)
    [path] = take(one)
    write(path, one)
    for _ in range(3):
        read(path, one)
        write(path, one)
    branch = one.ready[1]
    assert (one.seen.branches, len(one.seen.chances), one.undecided(path)) == (1, 1, False)
    end(one, path, branch)
    assert one.complete
    two = group(3, branch_threshold=2.0)
    [path] = take(two)
    write(path, two)
    end(two, path)
    fresh = take(two)
    assert [(path.row, path.completion) for path in fresh] == [(1, []), (2, [])]
    end(two, *fresh)
    assert two.complete


def test_the_path_that_went_ahead_is_judged_step_by_step_with_the_others():
    """Else it would use up the rows: here each of its two places and the other path's first get one of three rows."""
    states = States()
    one = group(5, fresh=None, states=states, **ALWAYS)
    [probe] = take(one)
    write(probe, one, root=0.0)
    for _ in range(3):
        read(probe, one)
        take(one)
        write(probe, one, entropy=1.0)
    end(one, probe)  # 5 sigmoid(-1) = 1.3: another one starts
    [second] = take(one)
    write(second, one)
    read(second, one)
    write(second, one)
    assert states.branched == [(0, 1, 2), (1, 1, 3)]
    end(one, *take(one))
    read(second, one)
    write(second, one)
    assert states.branched[2:] == [(0, 2, 4)]


def test_nobody_has_come_as_far_as_the_path_that_went_ahead():
    """Then its places are decided when all others have ended."""
    one = group(4, fresh=None, **ALWAYS)
    [probe] = take(one)
    write(probe, one)
    for _ in range(2):
        read(probe, one)
        take(one)
        write(probe, one, entropy=9.0)
    end(one, probe)  # 1 fresh path, which has ended
    assert [(path.row, len(path.turns)) for path in take(one)] == [(1, 1)]


def test_a_refused_branch_leaves_its_row_for_later():
    states = States(1)
    one = group(3, states=states, **ALWAYS)
    [path] = take(one)
    write(path, one)
    for _ in range(2):
        read(path, one)
        write(path, one)
    assert states.branched == [(0, 1, 1), (0, 2, 2)]
    assert (one.seen.branches, one.seen.refused) == (1, 1)
    branch = one.ready[-1]
    end(one, path, branch)
    [fresh] = [path for path in take(one) if not path.completion]
    assert (fresh.row, states.begun) == (1, [0, 1])


def test_results_with_nothing_after_them_are_no_place_to_branch_at():
    """A branch there would be a copy: the results used up the length."""
    path = Path(0, [7])
    path.add_segment([1], None, {})
    path.add_results(RESULTS, [], Turn((), ()))
    path.add_segment([], None, None)
    assert list(path.undecided) == []


def test_metrics_are_means_over_what_was_met(tmp_path):
    trainer = make_calling_trainer(BranchingTrainer, tmp_path, own={"tools": [step]})
    log_means(
        trainer,
        [
            Seen(2, [0.5, 0.75], 1, 3, [1.0], [2.0, 4.0]),
            Seen(4, [0.25], 0, 0, [], []),
        ],
    )
    metrics = {name: values for name, values in trainer._metrics["train"].items() if name.startswith("rollout/")}
    assert metrics == {
        "rollout/fresh_paths": [3.0],
        "rollout/branches": [0.5],
        "rollout/refused_branches": [1.5],
        "rollout/branch_chance": [0.5],
        "rollout/root_entropy": [1.0],
        "rollout/tool_entropy": [3.0],
    }
    log_means(trainer, [Seen(8)])
    assert trainer._metrics["train"]["rollout/fresh_paths"] == [3.0, 8.0]
    assert len(trainer._metrics["train"]["rollout/branch_chance"]) == 1  # of this batch there is none


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda trainer: setattr(trainer._dist, "fsdp_version", 2), "FSDP"),
        (lambda trainer: setattr(trainer._dist, "zero_stage", 3), "DeepSpeed ZeRO-3"),
        (lambda trainer: setattr(trainer, "tools", []), "no tools"),
        (lambda trainer: setattr(trainer, "rollout_func", print), "rollout_func"),
    ],
)
def test_what_cannot_branch_is_refused(tmp_path, change, text):
    trainer = make_calling_trainer(BranchingTrainer, tmp_path, own={"tools": [step]})
    change(trainer)
    with pytest.raises(ValueError, match=f"branched rollouts and {text}"):
        trainer.branch_with(BranchSettings())


def image(to: int) -> list:
    """Show it.

    Args:
        to: what
    """
    return [{"type": "image", "image": to}]


def test_images_are_refused(tmp_path):
    trainer = make_calling_trainer(
        BranchingTrainer, tmp_path, tools=["image"], own={"tools": [image]}, model={"call": 0.95}
    )
    trainer.branch_with(BranchSettings())
    with pytest.raises(ValueError, match="tool image returned an image"):
        trainer.train()
    prompt = [{"role": "user", "content": [{"type": "image", "image": 0}, {"type": "text", "text": "?"}]}]
    with pytest.raises(ValueError, match="prompt: got images"):
        BranchedRollout(BranchSettings(), [{"prompt": prompt}])([prompt], trainer)
