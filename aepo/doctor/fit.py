"""`aepo doctor MODEL_DIR`: whether a run with that model fits, here and in the memory of common GPUs, and how fast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from aepo.config import Config
from aepo.doctor.machine import memory_gib
from aepo.doctor.memory import Model, Need, Place, Plan, Workload, largest_micro_batch, need, taken
from aepo.doctor.speed import measured_rates, update_seconds
from aepo.learning.loss import policy_objective
from aepo.models.outline import read_model_config

GPUS = (24, 40, 80, 141)  # GiB


@dataclass(frozen=True)
class Verdict:
    """Of a plan in a place."""

    bytes: int
    fits: bool
    largest: int  # tokens_per_microbatch; 0: not even a sixteenth of those asked for


@dataclass(frozen=True)
class Row:
    plan: Plan
    asked: bool  # these are the settings of the run
    need: Need
    verdicts: dict[str, Verdict]  # by the name of the place; the first one is here
    seconds: float  # of an update here


@dataclass(frozen=True)
class Fit:
    model: Model
    work: Workload
    config: Config
    device: str
    places: tuple[Place, ...]
    rows: tuple[Row, ...]


def examine_fit(directory: Path, config: Config, prompt: int) -> Fit:
    """ValueError, in one line: it is no model that can be trained here."""
    model, work = Model(read_model_config(directory)), Workload.of(config, prompt)
    device = "cuda" if torch.cuda.is_available() and config.run.device != "cpu" else "cpu"
    places = (_here(device), *(Place(f"{size} GiB", "cuda", size * 2**30) for size in GPUS))
    dtypes = tuple(dict.fromkeys((torch.float32, torch.bfloat16, getattr(torch, config.model.dtype))))
    rates = measured_rates(model, dtypes, device)
    asked, recomputed = asked_plan(config), config.recomputes_old_logprobs

    def row(plan: Plan) -> Row:
        found = need(model, plan, work, config)
        verdicts = {place.name: _verdict(found, model, plan, work, config, place) for place in places}
        seconds = update_seconds(model, plan, work, rates, recomputed=recomputed)
        return Row(plan, plan == asked, found, verdicts, seconds)

    plans = [Plan(*each) for each in _each(dtypes)]
    return Fit(model, work, config, device, places, tuple(map(row, plans)))


def asked_plan(config: Config) -> Plan:
    """That of the settings."""
    policy = config.policy
    reference = policy.reference if policy.loss is not None else policy_objective(policy).kl_coef != 0
    return Plan(getattr(torch, config.model.dtype), config.train.gradient_checkpointing, reference)


def _each(dtypes: Sequence[torch.dtype]) -> Iterator[tuple[torch.dtype, bool, bool]]:
    return ((dtype, again, kept) for dtype in dtypes for again in (False, True) for kept in (False, True))


def _here(device: str) -> Place:
    if device == "cuda":
        return Place("here", "cuda", torch.cuda.mem_get_info()[0])
    return Place("here", "cpu", memory_gib()[0] * 2**30)


def _verdict(found: Need, model: Model, plan: Plan, work: Workload, config: Config, place: Place) -> Verdict:
    size = taken(found, model, plan, config, place)
    return Verdict(round(size), size <= place.size, largest_micro_batch(model, plan, work, config, place))


def as_record(fit: Fit) -> dict[str, Any]:
    """Bytes and seconds."""
    return {
        "parameters": fit.model.parameters,
        "device": fit.device,
        "workload": asdict(fit.work),
        "places": {place.name: {"kind": place.kind, "bytes": round(place.size)} for place in fit.places},
        "plans": [
            {
                "model.dtype": str(row.plan.dtype).removeprefix("torch."),
                "train.gradient_checkpointing": row.plan.checkpointing,
                "reference": row.plan.reference,
                "asked": row.asked,
                "bytes": {**asdict(row.need), "device": row.need.device("cuda"), "host": row.need.host},
                "places": {name: asdict(verdict) for name, verdict in row.verdicts.items()},
                "update_seconds": row.seconds,
            }
            for row in fit.rows
        ],
    }
