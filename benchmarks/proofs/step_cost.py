"""What does a decode step cost when entropies are wanted: ours, and log-probs of the ten likeliest tokens?"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.proofs.engines import WIDE, in_process, true_entropies, wide_model
from benchmarks.proofs.exactness import LARGEST
from benchmarks.proofs.result import Cell, Progress, Proof, Table, require, silent

PROMPT = 8
ALONE, NOTHING, OURS, TOP10 = "vLLM alone", "untracked", "aepo_key", "logprobs=10"
PROVIDERS = (ALONE, NOTHING, OURS, TOP10)
NUMBER = itertools.count()


def prove(
    *,
    vocab: int = WIDE,
    batches: Sequence[int] = (1, 4, 16, 64),
    steps: int = 12,
    rounds: int = 5,
    progress: Progress = silent,
) -> Proof:
    """ProofError: an entropy of a timed batch differs from the float64 model's by more than LARGEST nats."""
    progress("starting two engines")
    model = wide_model(vocab)
    llm, alone = in_process(model), in_process(model, records=False)
    truth = copy.deepcopy(model).double()
    places = [(temperature, batch) for temperature in (0.0, 1.0) for batch in batches]
    worst = 0.0
    for temperature, batch in places:  # also the warm-up: logprobs=10 is compiled for its first batch
        progress(f"checking: temperature {temperature:g}, B = {batch}")
        for provider in PROVIDERS:
            run = decode(alone if provider == ALONE else llm, provider, temperature, batch, steps)
            if provider == OURS:
                expected = true_entropies(truth, torch.tensor(run["tokens"]), PROMPT, temperature)
                worst = max(worst, (torch.tensor(run["entropies"]).double() - expected).abs().max().item())
    require(worst <= LARGEST, f"an entropy differs by {worst:.2g} nats, at most {LARGEST} expected")
    seconds: dict[tuple[float, int, str], list[float]] = {}
    for index, (temperature, batch) in itertools.product(range(rounds), places):
        progress(f"round {index + 1} of {rounds}: temperature {temperature:g}, B = {batch}")
        for provider in PROVIDERS:
            run = decode(alone if provider == ALONE else llm, provider, temperature, batch, steps)
            per_step = statistics.median(run["step_seconds"]) + run["fetch_seconds"] / steps
            seconds.setdefault((temperature, batch, provider), []).append(per_step)
    columns = {"tokens": "", "B": "d"} | dict.fromkeys(PROVIDERS, ".2f")
    columns |= {f"{OURS} adds": "+.1%", f"{TOP10} adds": "+.1%"}
    rows: list[list[Cell]] = []
    for temperature, batch in places:
        taken = {provider: seconds[temperature, batch, provider] for provider in PROVIDERS}
        ms = [1e3 * statistics.median(taken[provider]) for provider in PROVIDERS]
        added = [
            statistics.median(one / base for one, base in zip(taken[provider], taken[NOTHING], strict=True)) - 1
            for provider in (OURS, TOP10)
        ]
        label = "greedy" if temperature == 0 else "sampled, T = 1"
        rows.append([label, batch, *ms, *added])
    engine_table = Table(
        "A decode step of a running engine (ms)",
        columns,
        rows,
        f"Medians of {rounds} rounds of {steps} steps, all in turn; V = {vocab:,}, float32. aepo_key includes fetching "
        "the numbers at the end. logprobs=10 comes after its compilation, and without the texts of the tokens, which "
        "this model does not have. Untracked: the same engine, requests without a key; vLLM alone: one without the "
        "processor. What is added is relative to untracked in the same round.",
    )
    return Proof(
        claim="What an exact entropy of every token adds to a decode step, beside the ten likeliest log-probs of the "
        "published code.",
        checked=f"entropies of every batch that was timed; the largest difference to float64 is {worst:.1e} nats",
        tables=[engine_table, isolated(llm, vocab, batches, rounds, progress)],
    )


def decode(llm: Any, provider: str, temperature: float, batch: int, steps: int) -> dict[str, Any]:
    """One batch: seconds of each decode step and of fetching; tokens [B, PROMPT + steps + 1] and entropies of ours."""
    from vllm import SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    from aepo.vllm import fetch_entropies

    engine, vocab = llm.llm_engine, llm.llm_engine.model_config.get_vocab_size()
    draw = torch.Generator().manual_seed(batch)
    prompts = torch.randint(0, vocab, (batch, PROMPT), generator=draw).tolist()
    name = f"step-{next(NUMBER)}"
    keys = [f"{name}-{row}" for row in range(batch)]
    for key, prompt in zip(keys, prompts, strict=True):
        params = SamplingParams(
            temperature=temperature,
            max_tokens=steps + 1,  # the first one comes with the prompt
            ignore_eos=True,
            detokenize=False,
            logprobs=10 if provider == TOP10 else None,
            extra_args={"aepo_key": key} if provider == OURS else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        engine.add_request(key, TokensPrompt(prompt_token_ids=prompt), params)
    engine.step()
    step_seconds, outputs = [], []
    while engine.has_unfinished_requests():
        start = time.perf_counter()
        outputs += engine.step()
        step_seconds.append(time.perf_counter() - start)
    require(len(step_seconds) == steps, f"{len(step_seconds)} decode steps, expected {steps}")
    start = time.perf_counter()
    found = fetch_entropies(llm, dict.fromkeys(keys, steps + 1)) if provider == OURS else {}
    fetch_seconds = time.perf_counter() - start
    written = {output.request_id: list(output.outputs[0].token_ids) for output in outputs}
    return {
        "step_seconds": step_seconds,
        "fetch_seconds": fetch_seconds,
        "tokens": [prompt + written[key] for key, prompt in zip(keys, prompts, strict=True)],
        "entropies": [found[key] for key in keys if key in found],
    }


def isolated(llm: Any, vocab: int, batches: Sequence[int], rounds: int, progress: Progress) -> Table:
    """The two alone, on the same logits: the processor's apply(), and what vLLM's sampler does for logprobs=10."""
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate
    from vllm.v1.sample.logits_processor.interface import AddedRequest
    from vllm.v1.sample.sampler import Sampler

    from aepo.vllm import EntropyProcessor

    sampler = Sampler()
    rows: list[list[Cell]] = []
    for batch in batches:
        progress(f"apply() alone, B = {batch}")
        logits = 3 * torch.randn(batch, vocab, generator=torch.Generator().manual_seed(0))
        chosen = logits.argmax(dim=-1)
        processor = EntropyProcessor(llm.llm_engine.vllm_config, torch.device("cpu"))
        tracked = [SamplingParams(max_tokens=8, extra_args={"aepo_key": f"{row}"}) for row in range(batch)]
        added: list[AddedRequest] = [(row, params, [1], []) for row, params in enumerate(tracked)]
        processor.update_state(BatchUpdate(batch_size=batch, removed=[], added=added, moved=[]))

        def ours(processor: EntropyProcessor = processor, logits: Tensor = logits) -> None:
            processor.apply(logits)

        def top10(logits: Tensor = logits, chosen: Tensor = chosen) -> None:
            sampler.gather_logprobs(sampler.compute_logprobs(logits), 10, token_ids=chosen)

        apply_s, top10_s = in_turn([ours, top10], rounds)
        rate = logits.nbytes / apply_s / 1e9
        rows.append([batch, 1e3 * apply_s, 1e3 * top10_s, top10_s / apply_s, rate])
    columns = {"B": "d", "apply()": ".3f", "logprobs=10": ".3f", "times cheaper": ".1f", "GB/s of apply()": ".1f"}
    return Table(
        "The same alone, on given logits (ms)",
        columns,
        rows,
        "logprobs=10: log-softmax, the ten likeliest, the rank of the token; not the Python objects made of them.",
    )


def in_turn(calls: Sequence[Callable[[], None]], rounds: int, seconds: float = 0.05) -> list[float]:
    """Median seconds per call; each call is repeated for about `seconds` in every round."""
    repeats = []
    for call in calls:
        call()
        start = time.perf_counter()
        call()
        repeats.append(max(1, round(seconds / (time.perf_counter() - start))))
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, count, taken in zip(calls, repeats, samples, strict=True):
            start = time.perf_counter()
            for _ in range(count):
                call()
            taken.append((time.perf_counter() - start) / count)
    return [statistics.median(taken) for taken in samples]
