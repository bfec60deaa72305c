"""What becomes of keys and records when requests meet, run over, are asked in between or go away; both runners."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import vllm
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from aepo.vllm import (
    EntropyError,
    EntropyProcessor,
    entropy_status,
    fetch_decisions,
    fetch_entropies,
    forget_entropies,
)
from aepo.vllm.records import EntropyRecords
from tests.aepo.engine_toys import VOCAB, prompts
from tests.integrations.conftest import ENGINES, qwen
from tests.integrations.toys import NATS, from_model, generate, in_use, params


def start(llm, name, sampling):
    llm.llm_engine.add_request(name, {"prompt_token_ids": list(prompts(5)[0])}, sampling)


def step(llm, times=1):
    """The outputs that have ended."""
    return [output for _ in range(times) for output in llm.llm_engine.step() if output.finished]


def finish(llm):
    ended = []
    while llm.llm_engine.has_unfinished_requests():
        ended += step(llm)
    return {output.request_id: output.outputs[0] for output in ended}


@pytest.mark.parametrize(
    ("key", "n", "message"),
    [*((key, 1, "a str of 1 to 256 characters") for key in ("", 7, "k" * 257, "\ud800")), ("k", 2, "n must be 1")],
)
def test_requests_that_cannot_be_tracked(llm, key, n, message):
    with pytest.raises(VLLMValidationError, match=message):
        generate(llm, prompts(3), [params(key, 3, n=n)])
    assert not llm.llm_engine.has_unfinished_requests()


def test_a_key_of_two_requests(llm):
    """Both finish; the key has a problem, the other keys keep their records until it is forgotten."""
    done = generate(llm, prompts(3, 4, 5), [params("twice", 6), params("twice", 9), params("good", 4)])
    assert [len(completion.token_ids) for completion in done] == [6, 9, 4]
    with pytest.raises(EntropyError, match="'twice': duplicate") as failure:
        fetch_entropies(llm, ["good", "twice"])
    assert failure.value.problems.keys() == {"twice"}
    assert forget_entropies(llm, ["twice"]) == 1
    assert len(fetch_entropies(llm, ["good"])["good"]) == 4
    assert in_use(llm) == (0, 0, 0)


def test_the_second_request_comes_later(llm):
    start(llm, "a", params("twice", 9))
    step(llm, 3)
    start(llm, "b", params("twice", 9))
    assert {len(completion.token_ids) for completion in finish(llm).values()} == {9}
    with pytest.raises(EntropyError, match="'twice': duplicate"):
        fetch_entropies(llm, ["twice"])
    forget_entropies(llm)
    assert in_use(llm) == (0, 0, 0)


def test_a_key_that_is_used_again(llm):
    """After its first request has ended it starts anew."""
    for tokens in (9, 4):
        generate(llm, prompts(3), [params("again", tokens)])
    assert len(fetch_entropies(llm, ["again"])["again"]) == 4
    assert in_use(llm) == (0, 0, 0)


def test_overflow(llm, monkeypatch):
    """A request without room runs on, and only its own record is missing. The pool grows from 8 to 30 tokens."""
    (processor,) = llm.collective_rpc("aepo_processor")
    monkeypatch.setattr("aepo.vllm.records.FIRST_SIZE", 8)
    monkeypatch.setattr(processor, "records", EntropyRecords(processor.records.pool.device, limit=30))
    asked = prompts(3, 4, 5)
    done = generate(llm, asked, [params("a", 12), params("b", 20), params("c", 18)])
    assert [len(completion.token_ids) for completion in done] == [12, 20, 18]
    with pytest.raises(EntropyError, match="'b': overflow: no room for 20 tokens, 12 of 30 are in use") as failure:
        fetch_entropies(llm, ["a", "b", "c"])
    assert failure.value.problems.keys() == {"b"}
    forget_entropies(llm, ["b"])
    recorded = fetch_entropies(llm, ["a", "c"])
    for key, i in (("a", 0), ("c", 2)):
        assert recorded[key] == pytest.approx(from_model(qwen(torch.float64), asked[i], done[i], 1.0), abs=NATS)
    assert in_use(llm) == (0, 0, 0)


def test_unknown_keys_and_wrong_counts(llm):
    generate(llm, prompts(3), [params("k", 5)])
    with pytest.raises(EntropyError) as failure:
        fetch_entropies(llm, {"k": 6, "q": 1})
    assert failure.value.problems == {
        "k": "5 entropies are recorded, 6 were asked for",
        "q": "unknown: never run, forgotten, or fetched before",
    }
    assert len(fetch_entropies(llm, {"k": 2})["k"]) == 2
    for keys in ("k", [1], {"k": -1}, {"k": 1.0}):
        with pytest.raises(TypeError, match="keys"):
            fetch_entropies(llm, keys)
    assert fetch_entropies(llm, []) == {}


def test_fetched_and_aborted_while_running(llm):
    """Fetching ends the tracking, the request goes on; an aborted request leaves what has to be forgotten."""
    start(llm, "a", params("a", 12))
    start(llm, "b", params("b", 12))
    step(llm, 5)
    early = fetch_entropies(llm, ["a"])["a"]
    assert 3 <= len(early) <= 5
    llm.llm_engine.abort_request(["b"])
    assert len(finish(llm)["a"].token_ids) == 12
    with pytest.raises(EntropyError, match="'a': unknown"):
        fetch_entropies(llm, ["a"])
    assert in_use(llm)[:2] == (1, 12)
    assert forget_entropies(llm) == 1
    assert in_use(llm) == (0, 0, 0)


def test_decisions_of_a_running_request(llm):
    """Against the rule by hand, from the entropies that are fetched in the end."""
    generate(llm, prompts(4), [params("first", 3)])
    start(llm, "a", params("a", 12))
    step(llm, 3)
    query = {"window": 5, "alpha": 0.4, "gamma": 2.0, "penalty": 0.1, "consecutive": 3, "threshold": 0.1}
    queries = {"a": {**query, "initial_entropy": 4.0}}
    assert fetch_decisions(llm, queries) == {"a": None}
    step(llm, 4)
    running = fetch_decisions(llm, queries)["a"]
    from_key = fetch_decisions(llm, {"a": {**query, "initial_key": "first"}})["a"]
    finish(llm)
    values = fetch_entropies(llm, {"a": 12, "first": 3})
    entropy, first = sum(values["a"][:5]) / 5, sum(values["first"]) / 3
    for decision, initial in ((running, 4.0), (from_key, first)):
        delta = (entropy - initial) / math.log(VOCAB)
        chance = (0.4 + 2.0 * delta) * (1 - 0.1 * 3)
        assert decision == pytest.approx(
            {"entropy": entropy, "delta": delta, "probability": chance, "branch": chance > 0.1}, rel=1e-12
        )
    with pytest.raises(EntropyError, match="'a': unknown"):
        fetch_decisions(llm, queries)


def test_nothing_is_known_of_a_prompt_that_is_half_read(llm, monkeypatch):
    """The rows of a prompt's first chunks are no tokens, although one runner computes them."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    monkeypatch.setattr(scheduler, "max_num_scheduled_tokens", 4)
    query = {"a": {"window": 1, "alpha": 0.5, "initial_entropy": 4.0}}
    llm.llm_engine.add_request("a", {"prompt_token_ids": [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]}, params("a", 4))
    step(llm, 2)
    assert fetch_decisions(llm, query) == {"a": None}
    step(llm)
    assert fetch_decisions(llm, query)["a"] is not None
    finish(llm)
    assert len(fetch_entropies(llm, {"a": 4})["a"]) == 4


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"alpha": 0.5}, "one of initial_entropy .* and initial_key"),
        ({"alpha": 0.5, "initial_entropy": 1.0, "initial_key": "b"}, "one of"),
        ({"initial_entropy": 1.0}, "must have alpha"),
        ({"alpha": 0.5, "initial_entropy": 1.0, "windwo": 5}, r"unknown names \['windwo'\]"),
        ({"alpha": 0.5, "initial_entropy": 1.0, "window": 0}, "entropy_window = 0"),
        ({"alpha": 0.5, "initial_entropy": 1.0, "consecutive": -1}, "consecutive must be >= 0"),
        ({"alpha": "uniform", "initial_entropy": 1.0}, "alpha must be int or float"),
        ({"alpha": 0.5, "initial_entropy": 1.0, "window": 2.0}, "window must be int"),
        ({"alpha": -1, "initial_entropy": 1.0}, r"alpha must be in \[0, 1\]; got -1"),
        ({"alpha": 5, "initial_entropy": 1.0}, r"alpha must be in \[0, 1\]; got 5"),
        ({"alpha": math.nan, "initial_entropy": 1.0}, r"alpha must be in \[0, 1\]; got nan"),
        ({"alpha": 0.5, "initial_entropy": 1.0, "gamma": -1}, "gamma must be finite and >= 0; got -1"),
        ({"alpha": 0.5, "initial_entropy": 1.0, "gamma": math.inf}, "gamma must be finite and >= 0; got inf"),
        ({"alpha": 0.5, "initial_entropy": -1.0}, "initial_entropy must be finite and >= 0; got -1.0"),
        ({"alpha": 0.5, "initial_entropy": math.inf}, "initial_entropy must be finite and >= 0; got inf"),
        ({"alpha": 0.5, "initial_entropy": math.nan}, "initial_entropy must be finite and >= 0; got nan"),
    ],
)
def test_wrong_queries(query, message):
    with pytest.raises((TypeError, ValueError), match=rf"^queries\['a'\]: .*{message}"):
        fetch_decisions(SimpleNamespace(collective_rpc=None), {"a": query})


def test_penalties_before_the_processor_is_first(llm, monkeypatch):
    """Until a call has moved it, what penalties and biases have changed is not passed off as the model's entropy."""
    (processor,) = llm.collective_rpc("aepo_processor")
    monkeypatch.setattr(processor, "is_first", False)
    for key, change in {"a": {"repetition_penalty": 1.1}, "b": {"logit_bias": {3: 1.0}}, "c": {}}.items():
        monkeypatch.setattr(processor, "is_first", False)
        generate(llm, prompts(3), [params(key, 4, **change)])
    with pytest.raises(EntropyError, match="call entropy_status once") as failure:
        fetch_entropies(llm, ["a", "b", "c"])
    assert failure.value.problems.keys() == {"a", "b"}
    forget_entropies(llm)


def test_the_ten_lines_of_the_documentation(model_dir, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    vllm.envs.disable_envs_cache()
    page = (Path(__file__).parents[2] / "docs/vllm.md").read_text(encoding="utf-8")
    code = page.partition("```python\n")[2].partition("```")[0]
    small = f'"{model_dir}", dtype="float32", enforce_eager=True, max_model_len=256, kv_cache_memory_bytes=1 << 26,'
    names = {}
    exec(code.replace('"Qwen/Qwen3-0.6B",', small), names)
    ENGINES.append(names["llm"])
    lengths = {f"path-{i}": len(output.token_ids) for i, output in enumerate(names["outputs"])}
    assert {key: len(values) for key, values in names["entropies"].items()} == lengths
    assert len(lengths) == 8
    assert in_use(names["llm"]) == (0, 0, 0)


def test_status(llm):
    status = entropy_status(llm)
    assert status["vllm"] == vllm.__version__
    assert status["runner"] in ("v1", "v2")
    assert (status["vocab_size"], status["max_model_len"], status["logprobs_mode"]) == (VOCAB, 256, "raw_logprobs")
    assert status["capacity"] == 1 << 25


def config(sharded=False, **aepo):
    return SimpleNamespace(
        parallel_config=SimpleNamespace(enable_batch_sharded_sampling=sharded),
        model_config=SimpleNamespace(max_model_len=64),
        additional_config={"aepo": aepo} if aepo else {},
    )


def test_rows_that_are_given_up_and_taken_back():
    """By hand: b is preempted, a ends, b comes back in the row of a, then trades places with an untracked request."""
    processor, ln = EntropyProcessor(config(), torch.device("cpu")), math.log
    processor.is_first = True
    a, b, out_a, out_b = params("a", 4), params("b", 4), [], []
    even, sure = torch.zeros(1, 8), torch.tensor([[60.0] + [0.0] * 7])  # entropies ln 8 and 0

    def update(size, removed=(), added=(), moved=()):
        processor.update_state(BatchUpdate(size, removed, added, moved))

    update(2, added=[(0, a, [1], out_a), (1, b, [1], out_b)])
    processor.apply(torch.cat([even, sure]))
    out_a.append(5), out_b.append(5)
    update(1, removed=[1])
    processor.apply(sure)
    out_a.append(5)
    update(1, removed=[0], added=[(0, b, [1], out_b)])
    processor.apply(even)
    out_b.append(5)
    update(2, added=[(1, params(None), [1], [])], moved=[(0, 1, MoveDirectionality.SWAP)])
    processor.apply(torch.cat([sure, even]))
    out_b.append(5)
    values, problems = processor.records.read({"a": 2, "b": 3})
    assert not problems
    assert values["a"] == pytest.approx([ln(8), 0.0], abs=1e-6)
    assert values["b"] == pytest.approx([0.0, ln(8), ln(8)], abs=1e-6)


def test_engines_that_are_refused(monkeypatch):
    cpu = torch.device("cpu")
    assert EntropyProcessor(config(capacity=100), cpu).records.limit == 100
    for wrong, message in (({"capacity": 0}, "must be an int >= 1"), ({"size": 9}, r"unknown keys \['size'\]")):
        with pytest.raises(ValueError, match=message):
            EntropyProcessor(config(**wrong), cpu)
    with pytest.raises(ValueError, match="enable_batch_sharded_sampling"):
        EntropyProcessor(config(sharded=True), cpu)
    monkeypatch.setattr(vllm, "__version_tuple__", (0, 33, 0))
    EntropyProcessor(config(), cpu)
    for version in ((0, 31, 9), (0, 34, 0)):
        monkeypatch.setattr(vllm, "__version_tuple__", version)
        with pytest.raises(ImportError, match=r"needs vllm >=0.32,<0.34; found"):
            EntropyProcessor(config(), cpu)
