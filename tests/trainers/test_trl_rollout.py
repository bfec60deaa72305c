"""Branched rollouts in the real TRL: TRL's own token for token where nothing branches, and what holds where it does."""

import asyncio
import copy
import itertools
import math
from collections import Counter

import pytest
import torch
from calling_toys import CLOSE, Recorder, Walk, make_calling_trainer, opening, questions, step
from transformers import set_seed
from trl import GRPOTrainer

from aepo.branching import BranchSettings
from aepo.integrations.trl import AEPOConfig, AEPOTrainer
from aepo.integrations.trl.branching.entropies import measure
from aepo.integrations.trl.branching.paths import Path, Turn
from aepo.integrations.trl.branching.rollout import BranchingTrainer, rows_by_prompt, share

CONSTANT = {"branch_alpha": 0.6, "branch_gamma": 0.0}
ROWS = {"per_device_train_batch_size": 8, "num_generations": 8}


class Plain(Recorder, GRPOTrainer):
    pass


class Branching(Recorder, BranchingTrainer):
    pass


def branching(folder, rule=None, **changed):
    trainer = make_calling_trainer(Branching, folder, **changed)
    trainer.branch_with(BranchSettings(**(rule or {})))
    return trainer


async def slow(to: int) -> str:
    """Wait, and go there; 9 is a wall.

    Args:
        to: where
    """
    await asyncio.sleep(0.001 * (9 - to))
    if to == 9:
        raise ValueError("a wall")
    return f"slowly at {to}"


def blocks(to: int) -> list:
    """Say it in blocks.

    Args:
        to: where
    """
    return [{"type": "text", "text": str(to)}]


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"max_completion_length": 75},  # results that do not fit any more, and answers cut short
        {"max_tool_calling_iterations": 1},
        {"max_tool_calling_iterations": 0},
        {"own": {"environment_factory": Walk}},
    ],
)
def test_without_branches_it_is_what_trl_samples(tmp_path, changed):
    """Token for token: the waves are TRL's turns, and a call does what it does there."""
    tools = ["slow", "step" if "own" in changed else "blocks", "unknown"]
    own = {"tools": [slow] if "own" in changed else [slow, blocks]} | changed.get("own", {})
    arguments = {
        "tools": tools,
        "model": {"call": 0.95, "again": 0.4},
        "per_device_train_batch_size": 8,
        **changed,
        "own": own,
    }
    theirs = make_calling_trainer(Plain, tmp_path, **arguments).sample()
    ours = branching(tmp_path, {"fresh_paths": 4}, **arguments).sample()
    assert ours.prompt_ids == theirs.prompt_ids
    assert ours.completion_ids == theirs.completion_ids
    assert ours.mask == theirs.mask
    assert ours.messages == theirs.messages
    assert ours.logprobs is theirs.logprobs is None
    assert {name: ours.metrics[name] for name in theirs.metrics} == theirs.metrics
    if not changed:
        said = " ".join(str(ours.results(row)) for row in range(8))
        parts = ("slowly at", "'type': 'text'", "Tool unknown not found.")
        assert [part for part in parts if part not in said] == []
        assert Counter(len(ours.results(row)) for row in range(8))[0] < 8


@pytest.mark.parametrize(
    ("rule", "changed"),
    [
        ({**CONSTANT, "fresh_paths": 2}, {}),
        ({}, {}),  # pre-monitoring, and chances that are drawn
        ({**CONSTANT, "branch_penalty": 0.0, "entropy_window": 3}, {}),
        ({**CONSTANT, "fresh_paths": 1}, {"max_completion_length": 75}),
    ],
)
def test_every_row_has_a_completion_of_its_own(tmp_path, rule, changed):
    """What holds for any rollout, read off its tokens, its messages, and the segments that were sampled for it."""
    model = {"call": 0.9}
    trainer = branching(tmp_path, rule, own={"tools": [step]}, model=model, **(ROWS | changed))
    branches = []
    for seed in range(4):
        batch = trainer.sample(seed)
        left = Counter(batch.segments)
        for row, tokens in enumerate(batch.completion_ids):
            prompt, mask = batch.prompt_ids[row], batch.mask[row]
            assert len(tokens) == len(mask) <= trainer.max_completion_length
            runs = [
                (kind, [i for i, _ in run]) for kind, run in itertools.groupby(enumerate(mask), lambda item: item[1])
            ]
            said = [[tokens[i] for i in run] for kind, run in runs if kind]
            read = [[tokens[i] for i in run] for kind, run in runs if not kind]
            turns = [(role, [*run]) for role, run in itertools.groupby(batch.messages[row], lambda one: one["role"])]
            assert read == [trainer._get_tool_suffix_ids(run) for role, run in turns if role == "tool"]
            assert [trainer._tokenizer.decode(one, skip_special_tokens=True) for one in said] == [
                text_of(run[0]) for role, run in turns if role == "assistant"
            ]
            assert [int(call["arguments"]["to"]) for call in batch.calls(row)] == [
                int(result.removeprefix("at ")) for result in batch.results(row)
            ]
            last = sum(map(len, (*said[:-1], *read))) if runs[-1][0] else len(tokens)
            before, after = (*prompt, *tokens[:last]), tuple(tokens[last:])
            own = [one for one in left if one[0] == before and one[1][: len(after)] == after and left[one]]
            assert own, f"row {row}: its last segment was not sampled for it"
            left[own[0]] -= 1
        branches.append(batch.metrics["rollout/branches"])
    assert sum(branches) > 0
    assert 1 <= batch.metrics["rollout/fresh_paths"] <= 8


def text_of(message):
    calls = [call["function"] for call in message.get("tool_calls", ())]
    written = "".join(f"{opening(call['name'])}{call['arguments']['to']}{CLOSE}" for call in calls)
    return message["content"] + written


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropies_are_exact(tmp_path, temperature):
    """Means over the window, of distributions in float64 at the temperature that samples, whatever is in the batch."""
    trainer = branching(
        tmp_path, own={"tools": [step]}, temperature=temperature, per_device_train_batch_size=2, num_generations=2
    )
    generator = torch.Generator().manual_seed(0)

    def tokens(count):
        return torch.randint(256, (count,), generator=generator).tolist()

    paths = []
    for row, (prompt, segments) in enumerate([(9, [5]), (30, [4, 7, 2]), (3, [2, 9]), (12, [6, 1, 1, 8]), (5, [3, 3])]):
        path = Path(row, tokens(prompt))
        for number, size in enumerate(segments):
            if number:
                path.add_results(tokens(4), [], Turn((), ()))
            path.add_segment(tokens(size), None, None)
        paths.append(path)
    paths[2].initial_entropy = 1.25  # known: not measured again
    known = paths[1].undecided.popleft()  # decided: not asked about
    sizes = []
    forward = trainer.model.forward
    trainer.model.forward = lambda *args, **inputs: sizes.append(len(inputs["input_ids"])) or forward(*args, **inputs)
    measured = measure(trainer, paths, window=4)
    assert sizes == [2, 2, 1]
    assert [(path.row, initial, len(places)) for path, initial, places in measured] == [
        (0, True, 0), (1, True, 1), (2, False, 1), (3, True, 3), (4, True, 1),
    ]  # fmt: skip
    assert known.entropy is None
    trainer.model.forward = forward
    model = copy.deepcopy(trainer.model).double()
    for path in paths:
        with torch.no_grad():
            logits = model(torch.tensor([path.tokens])).logits[0] / temperature
        entropy = torch.distributions.Categorical(logits=logits).entropy()[len(path.prompt) - 1 : -1]
        if path.row != 2:
            assert path.initial_entropy == pytest.approx(entropy[: min(path.first, 4)].mean().item(), abs=2e-5)
        for place in path.undecided:
            end = place.end
            while end < len(path.mask) and path.mask[end] and end < place.end + 4:
                end += 1
            # 2e-5: the trainer's model is float32, and its logits are numbers around 20.
            assert place.entropy == pytest.approx(entropy[place.end : end].mean().item(), abs=2e-5)
    assert paths[2].initial_entropy == 1.25


def test_nothing_is_measured_where_no_row_is_left(tmp_path):
    trainer = branching(tmp_path, {"fresh_paths": 4}, own={"tools": [step]}, model={"call": 0.95})
    measured = []
    scored = trainer._get_per_token_logps_and_entropies
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: measured.append(k) or scored(*a, **k)
    metrics = trainer.sample().metrics
    assert measured == []  # one update per batch: TRL needs no old log-probs either
    assert metrics["rollout/fresh_paths"] == 4
    assert "rollout/branch_chance" not in metrics
    trainer.branch_with(BranchSettings(**CONSTANT, fresh_paths=1))
    assert trainer.sample().metrics["rollout/branches"] > 0
    assert measured


def test_logprobs_of_an_engine_stay_with_their_tokens(tmp_path):
    """0.0 on results. An engine that returns them needs a GPU: this one says the token itself."""

    class Told(Branching):
        def _generate_single_turn(self, *args, **kwargs):
            tokens, _ = super()._generate_single_turn(*args, **kwargs)
            return tokens, [[-token / 1000 for token in segment] for segment in tokens]

    trainer = make_calling_trainer(Told, tmp_path, own={"tools": [step]}, model={"call": 0.9}, **ROWS)
    trainer.branch_with(BranchSettings(**CONSTANT, fresh_paths=2))
    batch = trainer.sample()
    assert batch.metrics["rollout/branches"] > 0
    for tokens, mask, logprobs in zip(batch.completion_ids, batch.mask, batch.logprobs, strict=True):
        assert logprobs == [-token / 1000 if own else 0.0 for token, own in zip(tokens, mask, strict=True)]


def test_tool_metrics_count_what_is_in_the_completions(tmp_path):
    trainer = branching(
        tmp_path,
        {**CONSTANT, "fresh_paths": 2},
        tools=["slow", "unknown"],
        own={"tools": [slow]},
        model={"call": 0.9},
        max_completion_length=400,  # TRL counts calls whose results did not fit, too
        **ROWS,
    )
    batch = trainer.sample(1)
    results = [result for row in range(8) for result in batch.results(row)]
    failures = sum("error" in result for result in results)
    assert failures
    assert batch.metrics["tools/call_frequency"] == len(results) / 8
    assert batch.metrics["tools/failure_frequency"] == pytest.approx(failures / len(results))
    assert batch.metrics["rollout/branches"] > 0


def test_it_trains_and_evaluations_sample_as_trl_does(tmp_path):
    """Two steps of two micro-batches; then an evaluation, token for token TRL's."""
    own = {"tools": [step], "eval_dataset": questions(2)}
    arguments = {
        "own": own, "model": {"call": 0.9}, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "num_generations": 8, "per_device_eval_batch_size": 4, "num_generations_eval": 2,
    }  # fmt: skip
    trainer = branching(tmp_path, {**CONSTANT, "fresh_paths": 2}, **arguments)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "rollout/branches" in entry]
    assert len(logged) == 2
    assert all(math.isfinite(entry["loss"]) for entry in logged)
    plain = make_calling_trainer(Plain, tmp_path, **arguments)
    plain.model.load_state_dict(trainer.model.state_dict())
    found = []
    for one in (trainer, plain):
        set_seed(5)
        one.evaluate()
        found.append((one.generated, dict(one.state.log_history[-1])))
    assert found[0][0] == found[1][0]
    assert not [name for name in found[0][1] if "rollout" in name]


class AEPO(Recorder, AEPOTrainer, BranchingTrainer):
    pass


def test_aepo_trains_on_what_branched(tmp_path):
    """Its loss, its advantages per token, its masks: over tokens that the model wrote, before a branch and after it."""
    arguments = {"own": {"tools": [step]}, "model": {"call": 0.9}, "config": AEPOConfig, **ROWS}
    trainer = make_calling_trainer(AEPO, tmp_path, **arguments)
    trainer.branch_with(BranchSettings(**CONSTANT, fresh_paths=2))
    batch = trainer.sample()
    assert batch.metrics["rollout/branches"] > 0
    written = [[1 if own else 0 for own in mask] for mask in batch.mask]
    width = max(map(len, written))
    assert batch.scored["advantages"].shape == (8, width)
    assert batch.scored["tool_mask"].mul(batch.scored["completion_mask"]).tolist() == [
        mask + [0] * (width - len(mask)) for mask in written
    ]
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "rollout/branches" in entry]
    assert len(logged) == 2
    assert all(math.isfinite(entry["loss"]) and entry["policy/entropy_std"] > 0 for entry in logged)


def test_rows_of_a_prompt_are_a_group():
    assert rows_by_prompt(["a"] * 4 + ["b"] * 4, 0, 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert rows_by_prompt(["a"] * 8, 0, 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]  # two rows of the dataset, one prompt
    assert rows_by_prompt(["a", "x", "a", "y"], 0, 4) == [[0, 2], [1], [3]]  # resets at random
    assert rows_by_prompt(["a"] * 3 + ["b"] * 3, 6, 4) == [[0, 1], [2], [3, 4, 5]]  # the second rank: rows 6 to 11
    assert [share(None, 3, 8), share(4, 8, 8), share(4, 4, 8), share(4, 3, 8), share(1, 1, 8)] == [None, 4, 2, 2, 1]
