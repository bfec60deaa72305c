"""AdamW, also for weights of 16 bits, and the learning rate of each of its steps.

At a learning rate of 1e-6 a step changes a weight of 0.02 by a hundredth of the distance of two bfloat16 numbers there
(2^-13): added to the weight itself it is rounded away, always. So weights of 16 bits have masters in float32, which
AdamW changes and which the model has rounded; moments and gradients are float32 as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adamw import adamw
from transformers import PreTrainedModel

from aepo.config import OptimizerConfig
from aepo.parallel import state_dtype

ELEMENTS = 1 << 27
"""Of parameters that take their step together. On a GPU torch keeps a square root of each of them meanwhile: of all at
once 4 more bytes per parameter, 28 GiB for 7 B."""


class MasterAdamW(torch.optim.AdamW):
    """torch's, to the bit, but the state of a parameter of 16 bits has a float32 `master`, which takes the step and of
    which the parameter is the rounded value.

    Gradients are added up in float32 as well (`grad_dtype`): micro-batches would lose what is below 2^-9 of the sum.
    """

    def __init__(self, groups: list[dict], *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, lr=lr, betas=betas)
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            if has_master(parameter):
                parameter.grad = None  # of 16 bits, where somebody has asked for one before
                parameter.grad_dtype = state_dtype(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameters in _parts([p for p in group["params"] if p.grad is not None]):
                self._step(parameters, group)

    def _step(self, parameters: Sequence[Parameter], group: dict) -> None:
        states = [self._state_of(p) for p in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            [state.get("master", p) for p, state in zip(parameters, states, strict=True)],
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for parameter, state in zip(parameters, states, strict=True):
            if "master" in state:
                parameter.copy_(state["master"])

    def _state_of(self, parameter: Parameter) -> dict[str, Tensor]:
        """Made at the first step; the master also where the checkpoint of a run without masters has none."""
        state = self.state[parameter]
        if "exp_avg" not in state:
            state["step"] = torch.tensor(0.0)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(parameter, dtype=state_dtype(parameter))
        if has_master(parameter) and "master" not in state:
            state["master"] = parameter.detach().to(state_dtype(parameter), copy=True)
        return state


def has_master(parameter: Tensor) -> bool:
    return parameter.dtype != state_dtype(parameter)


def _parts(parameters: Sequence[Parameter]) -> Iterator[list[Parameter]]:
    """Of at most ELEMENTS, in order; one that is larger goes alone."""
    part: list[Parameter] = []
    elements = 0
    for parameter in parameters:
        if part and elements + parameter.numel() > ELEMENTS:
            yield part
            part, elements = [], 0
        part.append(parameter)
        elements += parameter.numel()
    if part:
        yield part


def make_optimizer(model: PreTrainedModel, config: OptimizerConfig) -> MasterAdamW:
    """AdamW with weight decay on matrices, not on biases and norms."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return MasterAdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=config.betas)


def learning_rate(config: OptimizerConfig, index: int, total: int) -> float:
    """Of optimiser step `index` of `total`: linear warmup, then constant, or linear to 0 after the last step."""
    if index < config.warmup_steps:
        return config.learning_rate * (index + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * max(total - index, 0) / max(total - config.warmup_steps, 1)
