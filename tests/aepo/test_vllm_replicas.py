"""What a `VLLMEngine` does with its replicas, and how a `vllm serve` is spoken to: no vLLM runs here."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from engine_toys import EOS, VOCAB, request

from aepo.rollout.engine import Generation, GenerationRequest
from aepo.rollout.engines.vllm import answers as vllm_answers
from aepo.rollout.engines.vllm.engine import VLLMEngine
from aepo.rollout.engines.vllm.http import api_key, ask
from aepo.rollout.engines.vllm.loop_thread import LoopThread
from aepo.rollout.engines.vllm.replica import (
    Completion,
    Recorded,
    ReplicaError,
    ReplicaGoneError,
    finish_reason,
    sampling_settings,
)

SECONDS = 20.0  # what waits for ever fails; the answers here take milliseconds


class Replica:
    """Writes one token, or ends as `ends` says, in turn; `records`: False: there are none."""

    def __init__(self, name: str, max_positions: int = 100, ends: Sequence[str] = ()) -> None:
        self.name, self.max_positions, self.ends = name, max_positions, list(ends)
        self.groups: list[str] = []
        self.forgotten: list[int] = []
        self.gone = False
        self.records = True
        self.stamped: str | None = None  # with the completion; with the entropies it is "1"
        self.logprob, self.entropy = -0.5, 0.25

    async def complete(self, request: GenerationRequest, key: str) -> Completion:
        if self.gone:
            raise ReplicaGoneError(f"{self.name} has died")
        self.groups.append(request.group)
        reason: Any = self.ends.pop(0) if self.ends else "length"
        tokens = () if reason == "abort" else (5,)
        return Completion(tokens, (self.logprob,) * len(tokens), reason, len(request.token_ids) - 1, self.stamped)

    async def entropies(self, lengths: Mapping[str, int]) -> Recorded:
        if not self.records:
            raise ReplicaError(f"{self.name} has no records")
        return Recorded({key: [self.entropy] * length for key, length in lengths.items()}, "1")

    async def forget(self, keys: Sequence[str]) -> None:
        if self.gone:
            raise AssertionError("nobody is there")
        self.forgotten.append(len(keys))

    async def close(self) -> None:
        pass


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    made = LoopThread()
    yield made
    made.close()


def engine_of(loop: LoopThread, *replicas: Replica, **more: Any) -> VLLMEngine:
    given: Any = {"vocab_size": VOCAB, "version": 1, "weights_dir": None, **more}
    return VLLMEngine(replicas, loop, **given)


def generate(engine: VLLMEngine, *groups: str) -> list[Generation]:
    requests = [replace(request([1, 2, 3], 4), group=group) for group in groups]
    return asyncio.run(asyncio.wait_for(engine.generate(requests), SECONDS))


def test_groups_are_spread_evenly_and_stay_where_they_are(loop: LoopThread) -> None:
    replicas = [Replica(name) for name in "xyz"]
    engine = engine_of(loop, *replicas)
    generate(engine, *"abcde")
    generate(engine, *"abcde")
    assert [sorted(replica.groups) for replica in replicas] == [list("aadd"), list("bbee"), list("cc")]
    assert (engine.counters.asked, engine.counters.prefilled, engine.counters.generated) == (30, 20, 10)
    engine.release()
    generate(engine, "g")
    assert replicas[0].groups[-1] == "g", "those of the batch before count no more"


def test_no_request_is_longer_than_the_smallest_replica_takes(loop: LoopThread) -> None:
    engine = engine_of(loop, Replica("x", 100), Replica("y", 6), Replica("z", 50))
    assert engine.max_positions == 6
    with pytest.raises(ValueError, match=r"requests\[0\]: 3 tokens \+ 4 new ones, but the model has 6 positions"):
        generate(engine, "a")


def test_what_others_abort_is_asked_for_again_but_not_for_ever(loop: LoopThread) -> None:
    replica = Replica("x", ends=["abort"] * 2)
    engine = engine_of(loop, replica)
    assert [one.token_ids for one in generate(engine, "a")] == [(5,)]
    replica.ends = ["abort"] * 9
    with pytest.raises(ReplicaError, match="x: a request was aborted 3 times, not by this engine"):
        generate(engine, "a")
    assert len(replica.ends) == 6


def test_the_groups_of_a_replica_that_is_gone_move(loop: LoopThread) -> None:
    replicas = [Replica(name) for name in "xyz"]
    engine = engine_of(loop, *replicas)
    generate(engine, *"abc")
    replicas[0].gone = True
    assert len(generate(engine, *"abc")) == 3
    assert [sorted(replica.groups) for replica in replicas] == [["a"], ["a", "b", "b"], ["c", "c"]]
    replicas[0].gone = False
    generate(engine, *"abc")
    assert replicas[0].groups == ["a"], "its weights would be old ones"


def test_records_that_nobody_has_fetched_are_forgotten_once(loop: LoopThread) -> None:
    replicas = Replica("x"), Replica("y")
    replicas[1].records = False
    engine = engine_of(loop, *replicas)
    with pytest.raises(ReplicaError, match="y has no records"):
        generate(engine, "a", "b")
    engine.release()
    engine.release()
    assert replicas[1].forgotten == [1]


def test_a_replica_that_is_gone_is_not_asked_to_forget(loop: LoopThread) -> None:
    replicas = Replica("x"), Replica("y")
    replicas[1].records = False
    engine = engine_of(loop, *replicas)
    with pytest.raises(ReplicaError, match="y has no records"):
        generate(engine, "a", "b")
    replicas[1].gone = True
    generate(engine, "b")
    engine.release()
    assert replicas[0].groups == ["a", "b"]


def test_weights_of_others_are_not_changed(loop: LoopThread) -> None:
    engine = engine_of(loop, Replica("x"))
    with pytest.raises(RuntimeError, match="made without weights to send"):
        engine.refresh(2, iter(()))
    engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.refresh(2, iter(()))


@pytest.mark.parametrize("stamped", [None, "1", "2"])
def test_weights_that_were_not_sent_are_noticed_wherever_they_are_stamped(
    loop: LoopThread, stamped: str | None
) -> None:
    replica = Replica("x")
    replica.stamped = stamped
    ours, stamp = Path("/new/weights"), stamped or "1"
    assert len(generate(engine_of(loop, replica, weights_dir=ours, stamp=stamp), "a")) == 1
    with pytest.raises(ReplicaError, match=f"x: a segment was sampled with weights version {stamp}, expected 3: they"):
        generate(engine_of(loop, replica, weights_dir=ours, stamp="3"), "a")
    assert len(generate(engine_of(loop, replica), "a")) == 1, "whose weights are not ours may have any"


@pytest.mark.parametrize("weights_dir", [None, Path("/new/weights")])
def test_nothing_is_taken_of_a_replica_with_a_part_of_new_weights(loop: LoopThread, weights_dir: Path | None) -> None:
    replica = Replica("x")
    replica.stamped = "partly-loaded"
    with pytest.raises(ReplicaError, match="x: an update of its weights did not finish, a part may be old"):
        generate(engine_of(loop, replica, weights_dir=weights_dir, stamp="3"), "a")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["logprob", "entropy"])
def test_numbers_that_are_not_finite_are_an_error(loop: LoopThread, name: str, value: float) -> None:
    replica = Replica("x")
    setattr(replica, name, value)
    with pytest.raises(FloatingPointError, match="x: the model's logits are not finite at output position 0"):
        generate(engine_of(loop, replica), "a")


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
def test_a_segment_is_sampled_as_it_was_asked_for(temperature: float) -> None:
    """Nothing is added, nothing left out of the text; seeds are halved, since vLLM's are signed."""
    asked = request([1, 2], 9, seed=2**64 - 1, temperature=temperature, stop=("</a>", "</b>"))
    assert sampling_settings(asked, [EOS, 7]) == {
        "temperature": temperature,
        "max_tokens": 9,
        "seed": 2**63 - 1,
        "stop": ["</a>", "</b>"],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "ignore_eos": True,
        "stop_token_ids": [EOS, 7],
        "logprobs": 0,
    }


def test_how_a_segment_ended() -> None:
    ends = [("stop", "</a>"), ("stop", EOS), ("stop", None), ("length", None), ("abort", None)]
    assert [finish_reason(*end) for end in ends] == ["stop", "eos", "eos", "length", "abort"]
    with pytest.raises(RuntimeError, match="finish_reason = 'error', expected stop, length or abort"):
        finish_reason("error", None)


def answered(status: int, content: bytes, **more: Any) -> Any:
    """What `ask` makes of it."""

    async def asked() -> Any:
        transport = httpx.MockTransport(lambda _: httpx.Response(status, stream=httpx.ByteStream(content)))
        async with httpx.AsyncClient(base_url="http://x", transport=transport) as client:
            return await ask(client, "http://x", "/path", {}, seconds=5.0, **more)

    return asyncio.run(asked())


def test_a_server_that_has_failed_is_gone_and_one_that_refuses_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert answered(200, b'{"a": 1}') == {"a": 1}
    for status in (500, 502, 503):
        with pytest.raises(ReplicaGoneError, match=rf"^http://x failed with status {status} \(/path\): no$"):
            answered(status, b"no")
    for status in (400, 404, 429, 499):
        with pytest.raises(ReplicaError, match=rf"^http://x: refused /path with status {status}: no$") as refused:
            answered(status, b"no", if_not_found="" if status == 404 else "started without a plugin")
        assert not isinstance(refused.value, ReplicaGoneError)
    with pytest.raises(ReplicaError, match=r"^http://x: VLLM_API_KEY of this environment is not set, and the server"):
        answered(401, b"no")
    with pytest.raises(ReplicaError, match=r"^http://x: started without a plugin \(/path\)$"):
        answered(404, b"no", if_not_found="started without a plugin")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b'{"error": {"message": "two\\nlines"}}', "two lines"),
        (b'{"error": "ours"}', "ours"),
        (b"x" * 2000, "x" * 500),
        (b'{"other": 1}', '{"other": 1}'),
    ],
)
def test_the_words_of_a_refusal_are_one_line_of_500_characters(said: bytes, words: str) -> None:
    with pytest.raises(ReplicaError) as refused:
        answered(400, said)
    assert str(refused.value) == f"http://x: refused /path with status 400: {words}"


@pytest.mark.parametrize("size", [10, 11])
def test_an_answer_may_have_so_many_bytes(size: int) -> None:
    content = b"1" * size
    if size == 10:
        assert answered(200, content, most=10) == 1111111111
    else:
        with pytest.raises(ReplicaError, match="http://x: /path answered more than 10 bytes"):
            answered(200, content, most=10)


@pytest.mark.parametrize("key", ["sec ret", "sec\tret", "secret\n", "sécret", "sec\x7fret"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", key)
    with pytest.raises(ValueError, match="VLLM_API_KEY: expected printable ASCII without spaces") as refused:
        api_key()
    assert "ret" not in str(refused.value)
    monkeypatch.setenv("VLLM_API_KEY", "")
    assert api_key() is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_model_len", 0),
        ("max_model_len", "9"),
        ("vocab_size", True),
        ("logprobs_mode", None),
        ("weights_dir", 1),
        ("weight_version", None),
    ],
)
def test_a_status_that_cannot_be_right(name: str, value: object) -> None:
    right = {"vocab_size": 9, "max_model_len": 1, "logprobs_mode": "x", "weights_dir": None, "no_weights": "why"}
    right["weight_version"] = "default"
    assert vllm_answers.status(right) == right
    with pytest.raises(ValueError, match=f"'{name}' is {value!r}, expected"):
        vllm_answers.status({**right, name: value})


@pytest.mark.parametrize(("cached", "prefilled"), [(None, 3), (0, 3), (2, 1), (3, 0)])
def test_tokens_of_the_prefix_that_no_cache_had(cached: int | None, prefilled: int) -> None:
    choice = {"token_ids": [5], "finish_reason": "length", "stop_reason": None}
    answer = {
        "choices": [{**choice, "logprobs": {"token_logprobs": [-0.5]}}],
        "usage": {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": cached}},
    }
    assert vllm_answers.completion(answer, request([1, 2, 3]), VOCAB).prefilled == prefilled
