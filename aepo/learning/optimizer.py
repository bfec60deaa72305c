"""AdamW, also for weights of 16 bits, and the learning rate of each of its steps.

At a learning rate of 1e-6 a step changes a weight of 0.02 by a hundredth of the distance of two bfloat16 numbers there
(2^-13): added to the weight itself it is rounded away, always. So weights of 16 bits have masters in float32, which
AdamW changes and which the model has rounded; moments and gradients are float32 as well.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from transformers import PreTrainedModel

from aepo.config import OptimizerConfig
from aepo.parallel import state_dtype


class MasterAdamW(torch.optim.AdamW):
    """AdamW whose state has a float32 `master` of every parameter, which gets it back rounded.

    Gradients are added up in float32 as well (`grad_dtype`): micro-batches would lose what is below 2^-9 of the sum.
    """

    def __init__(self, groups: list[dict], *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, lr=lr, betas=betas)
        for parameter in self._parameters():
            parameter.grad_dtype = state_dtype(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            states = [self._state_of(p) for p in parameters]
            beta1, beta2 = group["betas"]
            adamw(
                [state["master"] for state in states],
                [p.grad for p in parameters],
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
                parameter.copy_(state["master"])

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """Made at the first step, or where a checkpoint of a run without masters has none: the weight as it is."""
        state = self.state[parameter]
        if "exp_avg" not in state:
            state["step"] = torch.tensor(0.0)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(parameter, dtype=state_dtype(parameter))
        if "master" not in state:
            state["master"] = parameter.detach().to(state_dtype(parameter), copy=True)
        return state

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]


def make_optimizer(model: PreTrainedModel, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices, not on biases and norms."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    narrow = any(p.dtype.itemsize < 4 for p in parameters)
    return (MasterAdamW if narrow else torch.optim.AdamW)(
        [g for g in groups if g["params"]], lr=config.learning_rate, betas=config.betas
    )


def learning_rate(config: OptimizerConfig, index: int, total: int) -> float:
    """Of optimiser step `index` of `total`: linear warmup, then constant, or linear to 0 after the last step."""
    if index < config.warmup_steps:
        return config.learning_rate * (index + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * max(total - index, 0) / max(total - config.warmup_steps, 1)
