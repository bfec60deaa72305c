"""How every row is measured: gate, interleaved medians, ceilings from the same run, extra memory.

- Gate: a provider first solves the problem, or a small instance of it where float64 would not fit, and is compared
  with float64 truth; what fails gets no row. Memory that our own leaves unwritten is NaN then. The error is a column,
  because a fast wrong answer is easy.
- Proportion: a provider that a piece of the problem shows to be far slower than everything else gets no row either.
- Time: all providers and the ceilings run in turn, round after round, and each reports its median. Other load on the
  machine then falls on all alike, and ratios hold better than milliseconds do. Each row has the spread of its rounds;
  where that is large, nothing is compared.
- Ceiling: the bare reads, writes or matrix products that no implementation can avoid: timed as providers are, or known
  from a rate that was measured once.
- Work: one number per problem, what an ideal implementation moves or multiplies, so that rates compare.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from aepo.bench.clock import Clock
from aepo.bench.load import LoadMeter
from aepo_kernels.testing import poisoned_memory

GATE_TOLERANCE = 0.03
"""Largest error, relative to the largest true value, that a provider may have and still be timed, or twice eager's
where that is more. Wide enough for peers that round each intermediate result to bfloat16; the error column tells them
apart."""

PATIENCE_S = 6.0
"""A provider that has taken this long in the rounds of a problem sits out the rest, after two at least."""

SHORT_S = 0.005
"""Calls shorter than this are repeated within a round, above the noise of the clock."""

UNSTEADY = 0.25
"""A spread (interquartile range / median) above this makes a comparison meaningless: its factor could as well be 1."""

LONG_S, OUT_OF_PROPORTION = 20.0, 20.0
"""A call that would take longer than this, and this many times as long as the ceilings, is not waited for: a row is at
least three of them."""

BASELINE = "eager"
OURS = "aepo_kernels"


def spread(seconds: Sequence[float]) -> float | None:
    """Interquartile range / median; None for a single round."""
    if len(seconds) < 2:
        return None
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return (high - low) / median


def is_unsteady(spread: float | None) -> bool:
    return spread is not None and spread > UNSTEADY


def is_ours(name: str) -> bool:
    """A row's name is the provider, then what is particular to the row: "aepo_kernels, in place"."""
    return name.partition(",")[0] == OURS


def is_baseline(name: str) -> bool:
    return name.partition(",")[0] == BASELINE


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
    run: Callable[[], object] | None
    """Timed in the rounds; None where `seconds` are known."""
    work: float
    """Bytes or floating-point operations, as the problem's."""
    seconds: float = 0.0
    bound: bool = True
    """False: shown beside the others, no part of the bound."""


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
    piece: Any = None
    """Inputs of a part of the work, by which the time of a call is estimated before it is made; None: it is not."""
    piece_share: float = 1.0
    """Of the work."""

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
    spread: float | None
    """Interquartile range of the rounds / median; None for a single round, or where the ceiling is a rate."""
    rate: float
    unit: str
    extra_bytes: int | None
    """Peak of the memory that one call took, outputs included; None where it cannot be measured."""
    extra_share: float | None
    """The same / size of the logits, whether or not they exist."""
    others_cores: float | None = None
    """Mean number of cores that other programs kept busy during the rounds."""
    percent_of_ceiling: float | None = None
    """Time of the ceilings / time of this row. None for a ceiling, as are the next two, and where one of the two times
    is unsteady."""
    times_faster_than_eager: float | None = None
    max_error: float | None = None
    """At the gate."""

    @property
    def unsteady(self) -> bool:
        return is_unsteady(self.spread)


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
    """Largest error of any output relative to its largest true value, or itself where all are 0; infinite for NaN or
    another shape."""
    if [output.shape for output in outputs] != [expected.shape for expected in truth]:
        return float("inf")
    errors = [
        (output.double() - expected).abs().max() / torch.where(expected.any(), expected.abs().max(), 1.0)
        for output, expected in zip(outputs, truth, strict=True)
    ]
    return torch.stack(errors).max().nan_to_num(torch.inf, torch.inf).item()


def gate(
    problem: Problem, refuse: Callable[[Provider], str | None] = lambda provider: None
) -> Iterator[tuple[Provider, float | Refusal]]:
    """Every provider with its error, or why it gets no row. `refuse` is asked first."""
    tolerance = GATE_TOLERANCE
    # The baseline first, because its rounding error is allowed to everyone; then by what they compute, which lets a
    # problem keep one truth at a time.
    for provider in sorted(problem.providers, key=lambda one: (not is_baseline(one.name), one.computes)):
        try:
            if reason := refuse(provider):
                yield provider, Refusal(problem.question, problem.name, provider.name, reason)
                continue
            if problem.restore is not None:
                problem.restore(problem.gate_inputs)
            with _poison_for(provider):
                outputs = provider.run(problem.gate_inputs)
            error = problem.error(provider.computes, outputs)
        except Exception as failure:  # a peer may fail in any way; the others are still worth measuring
            yield provider, _failed(problem, provider, failure)
            continue
        if is_baseline(provider.name):
            tolerance = max(tolerance, 2 * error) if math.isfinite(error) else tolerance
        if error <= tolerance:
            yield provider, error
        else:
            reason = f"wrong: error {error:.2g} relative to float64, {tolerance:.2g} allowed"
            yield provider, Refusal(problem.question, problem.name, provider.name, reason)


@contextlib.contextmanager
def _poison_for(provider: Provider) -> Iterator[None]:
    """NaN in unwritten memory, for our own rows: in the deterministic mode that this takes torch.compile makes code of
    its own, so that each of its rows would be compiled twice."""
    if not is_ours(provider.name):
        yield
        return
    with poisoned_memory(warn_only=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about operations that are not deterministic; that is not asked here
        yield


def _too_long(problem: Problem, provider: Provider, bound_s: float) -> str | None:
    """Why a call would be out of all proportion, judged from a piece of it; our own rows are always made."""
    if problem.piece is None or is_ours(provider.name):
        return None
    longest_s = max(LONG_S, OUT_OF_PROPORTION * bound_s)
    call_s = float("inf")
    with torch.compiler.set_stance("force_eager"):  # a compiled provider's own time is not worth a compilation
        for _ in range(2):  # the first call may load and prepare things
            began = time.perf_counter()
            provider.run(problem.piece)
            call_s = min(call_s, (time.perf_counter() - began) / problem.piece_share)
            if call_s <= longest_s:
                return None
    return (
        f"left out: a call would take about {call_s:.0f} s (from {problem.piece_share:.1%} of the work), "
        f"{call_s / bound_s:.0f} times the ceiling"
    )


def _failed(problem: Problem, provider: Provider | Ceiling, failure: Exception) -> Refusal:
    message = (str(failure).strip().splitlines() or [""])[0][:200]
    return Refusal(problem.question, problem.name, provider.name, f"{type(failure).__name__}: {message}")


@dataclasses.dataclass
class _Samples:
    """What is known of one provider or ceiling while rounds go on."""

    run: Callable[[], object] | None
    prepare: Callable[[], object]
    repeats: int = 1
    extra_bytes: int | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)

    def start(self, clock: Clock) -> None:
        """Warm up, then a first round, and the memory of one call."""
        if self.run is None:
            return
        clock.seconds(self.run, self.prepare, 1)
        once: list[float] = []
        self.prepare()
        self.extra_bytes = clock.extra_memory(lambda: once.append(clock.seconds(self.run, _nothing, 1)))  # type: ignore[arg-type]
        self.repeats = min(max(1, int(SHORT_S / once[0])), clock.most_repeats)
        if self.repeats == 1:
            self.seconds = once
        else:
            self.round(clock)

    def wants_round(self, rounds: int) -> bool:
        patient = len(self.seconds) < 2 or sum(self.seconds) * self.repeats < PATIENCE_S
        return self.run is not None and len(self.seconds) < rounds and patient

    def round(self, clock: Clock) -> None:
        assert self.run is not None
        self.seconds.append(clock.seconds(self.run, self.prepare, self.repeats))

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float | None:
        return spread(self.seconds)

    @property
    def unsteady(self) -> bool:
        return is_unsteady(self.spread)


def _nothing() -> None:
    pass


Progress = Callable[[str, "float | None"], None]
"""Hears what is being done, and about how many seconds of the problem are to come, where that is known."""
Report = Callable[[Sequence["Row"], Sequence[Refusal]], None]
"""Hears all that is known of a problem after every row and every round."""


def measure(
    problem: Problem,
    clock: Clock,
    rounds: int,
    progress: Progress = lambda doing, to_come_s: None,
    report: Report = lambda rows, refused: None,
) -> tuple[list[Row], list[Refusal]]:
    """Gate and warm up one after the other, then time in turn."""
    torch.compiler.reset()  # after 8 shapes it would run the next one eagerly, under the name of torch.compile
    errors: dict[Provider, float] = {}
    refused: list[Refusal] = []
    beside: list[Refusal] = []
    samples: dict[Ceiling | Provider, _Samples] = {}

    def prepare() -> None:
        if problem.restore is not None:
            problem.restore(problem.inputs)

    def to_come() -> float | None:
        """As if those that have not begun took as long as the others do on average."""
        known = [one.seconds[-1] * one.repeats * (rounds - len(one.seconds)) for one in samples.values() if one.run]
        waiting = len(problem.providers) - len(errors) - len(refused)
        return sum(known) * (1 + waiting / len(known)) if known else None

    for ceiling in problem.ceilings:
        progress(ceiling.name, to_come())
        known = [] if ceiling.run else [ceiling.seconds]
        sample = _Samples(ceiling.run, _nothing, seconds=known)
        try:
            sample.start(clock)
        except Exception as failure:
            if ceiling.bound:
                raise
            beside.append(_failed(problem, ceiling, failure))
            continue
        samples[ceiling] = sample
    bound_s = sum(samples[ceiling].median for ceiling in problem.ceilings if ceiling.bound)

    def refuse(provider: Provider) -> str | None:
        progress(f"checking {provider.name}", to_come())
        return _too_long(problem, provider, bound_s)

    for provider, found in gate(problem, refuse):
        if isinstance(found, Refusal):
            refused.append(found)
            continue
        progress(f"warming up {provider.name}", to_come())
        sample = _Samples(lambda run=provider.run: run(problem.inputs), prepare)  # type: ignore[misc]
        try:
            sample.start(clock)
        except Exception as failure:  # the small instance fitted, this one may not
            refused.append(_failed(problem, provider, failure))
            continue
        samples[provider], errors[provider] = sample, found
        report(_rows(problem, samples, errors), [*beside, *refused])
    meter = LoadMeter()
    for index in range(1, rounds):
        for one, sample in samples.items():
            if sample.wants_round(rounds):
                progress(f"round {index + 1} of {rounds}, {one.name}", to_come())
                sample.round(clock)
        report(_rows(problem, samples, errors, meter.others_cores()), [*beside, *refused])
    return _rows(problem, samples, errors, meter.others_cores()), [*beside, *refused]


def _rows(
    problem: Problem,
    samples: Mapping[Ceiling | Provider, _Samples],
    errors: Mapping[Provider, float],
    others_cores: float | None = None,
) -> list[Row]:
    """The rows that can be made of what was timed up to now, in the problem's order."""
    bounds = [samples[ceiling] for ceiling in problem.ceilings if ceiling.bound]
    eager = next((samples[one] for one in problem.providers if one in samples and is_baseline(one.name)), None)
    rows = []
    for ceiling in (one for one in problem.ceilings if one in samples):
        computes = "ceiling" if ceiling.bound else "beside the ceiling"
        rows.append(_row(problem, ceiling.name, computes, ceiling.work, samples[ceiling], others_cores))
    for provider in problem.providers:
        if provider not in samples:
            continue
        sample = samples[provider]
        row = _row(problem, provider.name, provider.computes, problem.work, sample, others_cores)
        bounded = bool(bounds) and not any(one.unsteady for one in (sample, *bounds))
        compared = eager is not None and not (eager.unsteady or sample.unsteady)
        rows.append(
            dataclasses.replace(
                row,
                percent_of_ceiling=100 * sum(one.median for one in bounds) / sample.median if bounded else None,
                times_faster_than_eager=eager.median / sample.median if compared and eager is not None else None,
                max_error=errors[provider],
            )
        )
    return rows


def _row(problem: Problem, name: str, computes: str, work: float, samples: _Samples, others_cores: float | None) -> Row:
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
        spread=samples.spread,
        rate=work / samples.median / (1e9 if problem.unit == "GB/s" else 1e12),
        unit=problem.unit,
        extra_bytes=extra,
        extra_share=None if extra is None else extra / problem.logits_bytes,
        others_cores=others_cores,
    )
