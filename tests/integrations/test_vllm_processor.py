"""EntropyProcessor in real engines of both model runners: exact, by output position, whatever the scheduler does."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
from packaging import version
from vllm.sampling_params import StructuredOutputsParams

from aepo.vllm import EntropyError, entropy_status, fetch_decisions, fetch_entropies, forget_entropies
from tests.aepo.engine_toys import prompts, tokenizer
from tests.integrations.conftest import make_llm, qwen
from tests.integrations.toys import NATS, from_logprobs, from_model, generate, in_use, params

AB = tokenizer().convert_tokens_to_ids(["a", "b"])


@pytest.fixture(scope="module")
def truth():
    return qwen(torch.float64)


@pytest.fixture(scope="module", params=["v1", "v2"])
def tight(request, model_dir):
    """16 tokens per step, 6 blocks of 32 tokens: prompts come in chunks, and requests are preempted."""
    return make_llm(
        model_dir,
        request.param,
        max_model_len=128,
        max_num_batched_tokens=16,
        num_gpu_blocks_override=7,  # one of them is vLLM's own
        block_size=32,
        disable_log_stats=False,
    )


def counter(llm, name):
    return sum(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}")


def test_entropies_are_those_of_the_whole_vocabulary(llm, truth):
    """Temperatures, greedy, filters, seeds and an untracked request in one batch."""
    filters = {"top_p": 0.8, "top_k": 20}
    temperatures = [1.0, 0.7, 0.0, 1.6, 1.0, 0.7]
    sampling = [
        params(
            None if i == 3 else f"k{i}", 9 + i, t, logprobs=-1, seed=i if i % 2 else None, **(filters if i > 3 else {})
        )
        for i, t in enumerate(temperatures)
    ]
    asked = prompts(3, 17, 5, 9, 30, 12)
    done = generate(llm, asked, sampling)
    recorded = fetch_entropies(llm, {f"k{i}": len(done[i].token_ids) for i in (0, 1, 2, 4, 5)})
    assert recorded.keys() == {"k0", "k1", "k2", "k4", "k5"}
    for i in (0, 1, 2, 4, 5):
        values = recorded[f"k{i}"]
        assert values == pytest.approx(from_logprobs(done[i], temperatures[i]), abs=NATS)
        assert values == pytest.approx(from_model(truth, asked[i], done[i], temperatures[i]), abs=NATS)
        assert all(type(value) is float for value in values)
    assert max(recorded["k0"]) - min(recorded["k0"]) > 0.05  # the model is one whose entropies differ
    assert in_use(llm) == (0, 0, 0)


def test_penalties_and_biases_do_not_count(llm, truth):
    """The processor stands first (entropy_status has moved it): what is recorded is what a trainer recomputes."""
    entropy_status(llm)
    changed = params("k", 12, 0.9, repetition_penalty=1.8, presence_penalty=1.0, logit_bias={7: 9.0}, min_tokens=4)
    (prompt,) = prompts(6)
    (done,) = generate(llm, [prompt], [changed])
    values = fetch_entropies(llm, {"k": len(done.token_ids)})["k"]
    assert values == pytest.approx(from_model(truth, prompt, done, 0.9), abs=NATS)


@pytest.mark.parametrize("grammar", [False, True])
def test_masks(llm, truth, grammar):
    """A grammar's mask counts in both runners, a request's list of tokens only in the one that applies it earlier."""
    interpreted = entropy_status(llm)["runner"] == "v2" and not torch.cuda.is_available()
    if grammar and interpreted and version.parse(triton.__version__) >= version.parse("3.9"):
        pytest.skip("vLLM's grammar kernel has an integer mask, which the interpreter of Triton 3.9 refuses")
    mask = {"structured_outputs": StructuredOutputsParams(regex="[ab]{8,9}")} if grammar else {"allowed_token_ids": AB}
    (prompt,) = prompts(6)
    (done,) = generate(llm, [prompt], [params("k", 8, 0.9, **mask)])
    assert set(done.token_ids) == set(AB)
    counted = AB if grammar or entropy_status(llm)["runner"] == "v1" else slice(None)
    values = fetch_entropies(llm, {"k": 8})["k"]
    assert values == pytest.approx(from_model(truth, prompt, done, 0.9, counted), abs=NATS)


def test_prompts_in_chunks_preemption_and_waves(tight, truth):
    """16 requests through 8 slots: prompts take up to 4 steps, and the cache holds 2 to 6 requests at their ends."""
    before = counter(tight, "num_preemptions")
    asked = prompts(*[4 + 13 * i % 50 for i in range(16)], seed=1)
    temperatures = [(1.0, 0.0, 0.7)[i % 3] for i in range(16)]
    sampling = [params(None if i % 5 == 4 else f"k{i}", 16 + i, t) for i, t in enumerate(temperatures)]
    done = generate(tight, asked, sampling)
    assert counter(tight, "num_preemptions") > before
    tracked = [i for i in range(16) if i % 5 != 4]
    recorded = fetch_entropies(tight, {f"k{i}": len(done[i].token_ids) for i in tracked})
    for i in tracked:
        assert recorded[f"k{i}"] == pytest.approx(from_model(truth, asked[i], done[i], temperatures[i]), abs=NATS)
    assert in_use(tight) == (0, 0, 0)


def test_speculative_decoding(model_dir, tmp_path, truth):
    """Every drafted token has a row; those of rejected ones are written over. The draft is the model with noise."""
    draft = qwen(torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in draft.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.003)
    draft.save_pretrained(tmp_path)
    speculation = {"method": "draft_model", "model": str(tmp_path), "num_speculative_tokens": 3}
    llm = make_llm(model_dir, "v2", speculative_config=speculation, disable_log_stats=False)
    asked, temperatures = prompts(3, 17, 5), [0.0, 0.8, 1.0]
    done = generate(llm, asked, [params(f"k{i}", 16, t) for i, t in enumerate(temperatures)])
    assert 0 < counter(llm, "spec_decode_num_accepted_tokens") < counter(llm, "spec_decode_num_draft_tokens")
    query = {"window": 13, "alpha": 0.5, "initial_entropy": 5.0}  # 13 and 3 drafted ones are all 16
    decided = fetch_decisions(llm, {"k1": query, "k2": query | {"window": 17}})
    with pytest.raises(EntropyError, match="'k2': short"):
        fetch_decisions(llm, {"k1": {"window": 17, "alpha": 0.5, "initial_key": "k2"}})
    recorded = fetch_entropies(llm, {f"k{i}": 16 for i in range(3)})
    assert decided["k1"]["entropy"] == pytest.approx(sum(recorded["k1"][:13]) / 13, rel=1e-12)
    assert decided["k2"] is None
    for i, temperature in enumerate(temperatures):
        assert recorded[f"k{i}"] == pytest.approx(from_model(truth, asked[i], done[i], temperature), abs=NATS)
    assert in_use(llm) == (0, 0, 0)


def test_logits_stay_as_they_are(llm, model_dir):
    """Tokens and log-probs equal those of an engine without the processor, bit by bit."""
    runner = entropy_status(llm)["runner"]
    plain = make_llm(model_dir, runner, logits_processors=None)
    asked, temperatures = prompts(3, 17, 5, 9), [0.0, 0.8, 1.0, 1.3]
    both = [
        generate(
            engine,
            asked,
            [
                params(f"k{i}" if engine is llm and i != 2 else None, 16, t, logprobs=3, seed=i)
                for i, t in enumerate(temperatures)
            ],
        )
        for engine in (llm, plain)
    ]
    for ours, theirs in zip(*both, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.logprobs == theirs.logprobs
    forget_entropies(llm)


def test_untracked_requests_cost_nothing(llm, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("an untracked batch was computed")

    generate(llm, prompts(4), [params("k", 3)])  # its row stays known until it is fetched
    monkeypatch.setattr("aepo.vllm.processor.decode_entropy", never)
    generate(llm, prompts(3, 5), [params(None, 4, 0.7), params(None, 4)])
    assert forget_entropies(llm, ["k", "unknown"]) == 1
    assert in_use(llm) == (0, 0, 0)


def test_a_stop_string_that_is_seen_late(llm):
    """The engine may run a step past a stop string: so many tokens are read as the output has."""
    (prompt,) = prompts(4)
    (free,) = generate(llm, [prompt], [params("free", 20, 0.0)])
    stop = tokenizer().decode(free.token_ids[5:7])
    (cut,) = generate(llm, [prompt], [params("cut", 20, 0.0, stop=[stop])])
    assert cut.finish_reason == "stop"
    assert len(cut.token_ids) < 20
    recorded = fetch_entropies(llm, {"free": 20, "cut": len(cut.token_ids)})
    assert recorded["cut"] == recorded["free"][: len(cut.token_ids)]


def test_the_slot_based_runner_reads_nothing_on_the_host(llm, monkeypatch):
    """apply() over meta tensors: they have no values, so whatever the host would wait for raises."""
    (processor,) = llm.collective_rpc("aepo_processor")
    if processor.runner == "v1":
        pytest.skip("its apply() builds its indices on the host")

    def meta(*shape, dtype=torch.int32):
        return torch.empty(shape, dtype=dtype, device="meta")

    for wait in (lambda x: bool(x.any()), torch.Tensor.cpu, torch.Tensor.tolist, lambda x: x[x > 0]):
        with pytest.raises((RuntimeError, NotImplementedError)):  # what this test relies on
            wait(meta(3))
    slots = len(processor._kind)
    monkeypatch.setattr(processor, "_places", SimpleNamespace(gpu=meta(slots, 3, dtype=torch.int64)))
    monkeypatch.setattr(processor, "_temperature", SimpleNamespace(gpu=meta(slots, dtype=torch.float32)))
    monkeypatch.setattr(processor, "_kind", np.ones(slots, dtype=np.int8))
    monkeypatch.setattr(processor.records, "pool", meta(64, dtype=torch.float32))
    monkeypatch.setattr(processor.records, "slots", {0: None})
    ctx = SimpleNamespace(idx_mapping_np=np.arange(3), expanded_idx_mapping=meta(5), pos=meta(5, dtype=torch.int64))
    logits = meta(5, 260, dtype=torch.float32)
    assert processor.apply(logits, ctx) is logits


@pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM's own check of host syncs needs a GPU")
def test_no_host_sync_on_a_gpu(model_dir, monkeypatch):
    monkeypatch.setenv("VLLM_GPU_SYNC_CHECK", "error")
    llm = make_llm(model_dir, "v2")
    generate(llm, prompts(3, 5), [params("k", 8), params(None, 8, 0.7)])
    assert len(fetch_entropies(llm, {"k": 8})["k"]) == 8
