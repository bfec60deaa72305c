"""How every row is measured: gate, interleaved medians, ceilings from the same run, extra memory.

- Gate: a provider first solves the problem, or a small instance of it where float64 would not fit, and is compared with
  float64 truth; what fails gets no row. Memory that it leaves unwritten is NaN then. The error is a column, because a
  fast wrong answer is easy.
- Time: all providers and the ceilings run in turn, round after round, and each reports its median. Other load on the
  machine then falls on all alike, and ratios hold better than milliseconds do.
- Ceiling: the bare reads, writes or matrix products that no implementation can avoid, timed as providers are.
- Work: one number per problem, what an ideal implementation moves or multiplies, so that rates compare.
"""

from __future__ import annotations

import dataclasses
import statistics
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from aepo.bench.clock import Clock
from aepo_kernels.testing import poisoned_memory

GATE_TOLERANCE = 0.03
"""Largest error, relative to the largest true value, that a provider may have and still be timed, or twice eager's
where that is more. Wide enough for peers that round each intermediate result to bfloat16; the error column tells them
apart."""

PATIENCE_S = 6.0
"""A provider that has taken this long in the rounds of a problem sits out the rest, after two at least."""

SHORT_S = 0.005
"""Calls shorter than this are repeated within a round, above the noise of the clock."""

BASELINE = "eager"
OURS = "aepo_kernels"


@dataclasses.dataclass(frozen=True)
class Provider:
    """One way to solve a problem. `run` takes the problem's inputs."""

    name: str
    run: Callable[[Any], Sequence[Tensor]]
    computes: str
    """What comes out, e.g. "AEPO loss" or "log-prob": only equal things compare."""


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """Bare work that the problem cannot do without; the times of a problem's ceilings add up to its bound."""

    name: str
    run: Callable[[], object]
    work: float
    """Bytes or floating-point operations, as the problem's."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One shape of one question, with all who solve it."""

    question: str
    title: str
    """The same for all shapes."""
    tokens: int
    vocab: int
    hidden: int | None
    """Size of the hidden states, where the problem begins with those."""
    dtype: torch.dtype
    inputs: Any
    gate_inputs: Any
    """`inputs`, or a small instance with the same vocabulary."""
    error: Callable[[str, Sequence[Tensor]], float]
    """(what a provider computes, its outputs for gate_inputs) -> error relative to float64 truth."""
    providers: Sequence[Provider]
    ceilings: Sequence[Ceiling]
    work: float
    unit: str
    """Of the rate: "GB/s" for work in bytes, "TFLOP/s" for operations."""
    restore: Callable[[Any], None] | None = None
    """Brings inputs back that a provider may have overwritten; not timed."""

    @property
    def name(self) -> str:
        shape = f"[{self.tokens}, {self.vocab}]"
        if self.hidden is not None:
            shape = f"[{self.tokens}, {self.hidden}] x [{self.vocab}, {self.hidden}]"
        return f"{self.title}: {_name(self.dtype)} {shape}"

    @property
    def logits_bytes(self) -> int:
        return self.tokens * self.vocab * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table, and one entry of the JSON."""

    question: str
    title: str
    problem: str
    """The title with its shape."""
    provider: str
    computes: str
    tokens: int
    vocab: int
    hidden: int | None
    dtype: str
    rounds: int
    median_ms: float
    rate: float
    unit: str
    extra_bytes: int | None
    """Peak of the memory that one call took, outputs included; None where it cannot be measured."""
    extra_share: float | None
    """The same / size of the logits, whether or not they exist."""
    percent_of_ceiling: float | None = None
    """Time of the ceilings / time of this row. None for a ceiling, as are the next two."""
    times_faster_than_eager: float | None = None
    max_error: float | None = None
    """At the gate."""


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A provider that gets no row, and why."""

    question: str
    problem: str
    provider: str
    reason: str


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def max_error(outputs: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Largest error of any output relative to its largest true value; infinite for NaN or another shape."""
    if [output.shape for output in outputs] != [expected.shape for expected in truth]:
        return float("inf")
    errors = [
        (output.double() - expected).abs().max() / expected.abs().max()
        for output, expected in zip(outputs, truth, strict=True)
    ]
    return torch.stack(errors).max().nan_to_num(torch.inf).item()


def gate(problem: Problem) -> tuple[dict[Provider, float], list[Refusal]]:
    """Who may be timed, with the error of each, and who may not."""
    errors: dict[Provider, float] = {}
    refused = []
    tolerance = GATE_TOLERANCE
    # The baseline first, because its rounding error is allowed to everyone; then by what they compute, which lets a
    # problem keep one truth at a time.
    for provider in sorted(problem.providers, key=lambda one: (one.name != BASELINE, one.computes)):
        try:
            if problem.restore is not None:
                problem.restore(problem.gate_inputs)
            with poisoned_memory(warn_only=True), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about operations that are not deterministic; that is not asked here
                outputs = provider.run(problem.gate_inputs)
            error = problem.error(provider.computes, outputs)
        except Exception as failure:  # a peer may fail in any way; the others are still worth measuring
            refused.append(_failed(problem, provider, failure))
            continue
        if provider.name == BASELINE:
            tolerance = max(tolerance, 2 * error)
        if error <= tolerance:
            errors[provider] = error
        else:
            reason = f"wrong: error {error:.2g} relative to float64, {tolerance:.2g} allowed"
            refused.append(Refusal(problem.question, problem.name, provider.name, reason))
    return {provider: errors[provider] for provider in problem.providers if provider in errors}, refused


def _failed(problem: Problem, provider: Provider, failure: Exception) -> Refusal:
    message = (str(failure).strip().splitlines() or [""])[0][:200]
    return Refusal(problem.question, problem.name, provider.name, f"{type(failure).__name__}: {message}")


@dataclasses.dataclass
class _Samples:
    """What is known of one provider or ceiling while rounds go on."""

    run: Callable[[], object]
    prepare: Callable[[], object]
    repeats: int = 1
    extra_bytes: int | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)

    def start(self, clock: Clock) -> None:
        """Warm up, then a call that counts as the first round if it is a long one, and shows the memory."""
        clock.seconds(self.run, self.prepare, 1)
        once: list[float] = []
        self.prepare()
        self.extra_bytes = clock.extra_memory(lambda: once.append(clock.seconds(self.run, _nothing, 1)))
        self.repeats = max(1, int(SHORT_S / once[0]))
        if self.repeats == 1:
            self.seconds = once

    def round(self, clock: Clock) -> None:
        if len(self.seconds) < 2 or sum(self.seconds) * self.repeats < PATIENCE_S:
            self.seconds.append(clock.seconds(self.run, self.prepare, self.repeats))

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def _nothing() -> None:
    pass


def measure(
    problem: Problem, clock: Clock, rounds: int, progress: Callable[[str, float], None] = lambda doing, share: None
) -> tuple[list[Row], list[Refusal]]:
    """Gate, then time in turn. `progress` hears what is being done and which share of the problem is behind it."""
    progress("checking", 0)
    torch.compiler.reset()  # after 8 shapes it would run the next one eagerly, under the name of torch.compile
    errors, refused = gate(problem)

    def prepare() -> None:
        if problem.restore is not None:
            problem.restore(problem.inputs)

    samples: dict[Ceiling | Provider, _Samples] = {
        ceiling: _Samples(ceiling.run, _nothing) for ceiling in problem.ceilings
    }
    for provider in errors:
        samples[provider] = _Samples(lambda run=provider.run: run(problem.inputs), prepare)  # type: ignore[misc]
    steps = 1 + len(samples) + rounds
    for index, one in enumerate(list(samples)):
        progress(f"warming up {one.name}", (1 + index) / steps)
        try:
            samples[one].start(clock)
        except Exception as failure:  # the small instance fitted, this one may not
            if isinstance(one, Ceiling):
                raise
            del samples[one]
            refused.append(_failed(problem, one, failure))
    for index in range(rounds):
        progress(f"round {index + 1} of {rounds}", 1 - (rounds - index) / steps)
        for sample in samples.values():
            if len(sample.seconds) < rounds:
                sample.round(clock)
    ceiling_s = sum(samples[ceiling].median for ceiling in problem.ceilings)
    eager_s = next((samples[one].median for one in samples if one.name == BASELINE), None)
    rows = []
    for one, sample in samples.items():
        if isinstance(one, Ceiling):
            rows.append(_row(problem, one.name, "ceiling", one.work, sample))
        else:
            row = _row(problem, one.name, one.computes, problem.work, sample)
            rows.append(
                dataclasses.replace(
                    row,
                    percent_of_ceiling=100 * ceiling_s / sample.median,
                    times_faster_than_eager=None if eager_s is None else eager_s / sample.median,
                    max_error=errors[one],
                )
            )
    return rows, refused


def _row(problem: Problem, name: str, computes: str, work: float, samples: _Samples) -> Row:
    extra = samples.extra_bytes
    return Row(
        question=problem.question,
        title=problem.title,
        problem=problem.name,
        provider=name,
        computes=computes,
        tokens=problem.tokens,
        vocab=problem.vocab,
        hidden=problem.hidden,
        dtype=_name(problem.dtype),
        rounds=len(samples.seconds),
        median_ms=samples.median * 1e3,
        rate=work / samples.median / (1e9 if problem.unit == "GB/s" else 1e12),
        unit=problem.unit,
        extra_bytes=extra,
        extra_share=None if extra is None else extra / problem.logits_bytes,
    )
