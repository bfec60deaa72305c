"""Which backend serves the operations here: each is run and compared with float64."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature
from typing import Any

from aepo.doctor.finding import Finding, short
from aepo.install import pip_install

TOLERANCE = 1e-4  # relative, float32 kernels on 1000 logits: the tests hold them to much less
REMEDIES = {
    ("cpu", "cpu"): "pip install --no-build-isolation -e .",
    ("triton", "cuda"): pip_install("triton"),
}


def kernels() -> Iterator[Finding]:
    """Which backend serves the operations on each device here, checked by running them."""
    import torch

    import aepo_kernels
    from aepo_kernels import backend as backends

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        detail = f"{torch.cuda.device_count()} x {properties.name}, sm_{properties.major}{properties.minor}, {memory}"
        yield Finding("kernels", "CUDA", "ok", detail)
    else:
        built = f"built for CUDA {torch.version.cuda}, no device found" if torch.version.cuda else "a CPU build"
        yield Finding("kernels", "CUDA", "info", f"no device: torch is {built}")
    if backends.missing("cpu") is None:
        chosen = torch.ops.aepo_native.cpu_capability()
        yield Finding("kernels", "extension", "ok", f"compiled, runs its {chosen} code on this processor")
    elif "does not load" in (reason := str(backends.missing("cpu"))):
        yield Finding("kernels", "extension", "broken", reason, REMEDIES["cpu", "cpu"])
    functions = [name for name in aepo_kernels.__all__ if name[0].islower()]
    callables = [name for name in functions if callable(getattr(aepo_kernels, name))]
    operations = [name for name in callables if "backend" in signature(getattr(aepo_kernels, name)).parameters]
    for device in ["cpu", "cuda"][: 1 + torch.cuda.is_available()]:
        probe = torch.empty(1, 8, device=device)
        defaults = {operation: backends.resolve(None, probe, _stage(operation)) for operation in operations}
        for name in backends.BACKENDS:
            where = f"{name} on {device}"
            served = [one for one in operations if backends.unserved(name, probe, _stage(one)) is None]
            if not served:
                reason = backends.unserved(name, probe) or ""
                remedy = REMEDIES.get((name, device), "")
                yield Finding("kernels", where, "missing" if remedy else "info", reason, remedy)
                continue
            faults = {operation: fault_of(operation, name, device) for operation in served}
            wrong = [f"{operation}: {fault}" for operation, fault in faults.items() if fault]
            usual = [operation for operation in served if defaults[operation] == name]
            where_usual = "" if usual == served else f" for {', '.join(usual)}"
            good = f"{', '.join(served)}: agree with float64{f', the default{where_usual}' if usual else ''}"
            yield Finding("kernels", where, "broken" if wrong else "ok", "; ".join(wrong) or good)


def _stage(operation: str) -> str:
    """The stage whose backends are those of an operation."""
    return operation if operation in ("decode_entropy", "sample_with_entropy") else "token_stats"


def fault_of(operation: str, backend: str, device: str) -> str | None:
    """Run an operation and, if it has one, its backward; compare with the float64 reference; None: it is right."""
    import torch

    try:
        ours = _run(operation, backend, device, torch.float32)
    except Exception as error:  # a kernel that does not compile or run fails in as many ways as there are compilers
        return short(error)
    truth = _run(operation, "reference", "cpu", torch.float64)
    relative = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, truth, strict=True))
    return None if relative <= TOLERANCE else f"relative error {relative:.1e} against float64"


def _run(operation: str, backend: str, device: str, dtype: Any) -> list[Any]:
    """Value and gradient of an operation on the same seeded input every time, as float64 on the CPU."""
    import torch

    import aepo_kernels

    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(16, 1000, generator=generator)
    labels = torch.randint(1000, (16,), generator=generator).to(device)
    advantages = torch.randn(16, generator=generator).to(device, dtype)
    hidden, weight = torch.randn(16, 32, generator=generator), torch.randn(1000, 32, generator=generator)
    linear = operation.startswith("linear_")
    x = (hidden if linear else logits).to(device, dtype).requires_grad_()
    weight = weight.to(device, dtype)
    inputs = (x, weight) if linear else (x,)
    function = getattr(aepo_kernels, operation)
    if operation in ("decode_entropy", "sample_with_entropy"):  # without a gradient
        extra: dict[str, Any] = {"tokens": labels} if operation == "decode_entropy" else {"seed": 0}
        return [part.double().cpu() for part in function(x.detach(), **extra, backend=backend)]
    if operation == "entropy_from_logits":
        value = function(x, backend=backend)
    elif operation in ("selective_log_softmax", "logprobs_and_entropy", "linear_logprobs_and_entropy"):
        value = function(*inputs, labels, backend=backend)
    else:
        objective = aepo_kernels.PolicyObjective()
        scores = x @ weight.T if linear else x
        logprobs = torch.log_softmax(scores, -1).gather(-1, labels[:, None])[:, 0]
        first = (logprobs,) if operation == "policy_loss" else (*inputs, labels)
        old_logprobs = logprobs.detach() - 0.1 * advantages
        mask = torch.ones_like(labels)
        if operation in ("logits_loss", "linear_loss"):

            def ratio_times_advantage(logprobs: Any, entropy: Any) -> Any:
                return -((logprobs - old_logprobs).exp() * advantages + 0.1 * entropy).mean()

            value = function(*inputs, labels, mask, ratio_times_advantage, backend=backend).loss
        else:
            value = function(*first, old_logprobs, advantages, mask, objective=objective, backend=backend).loss
    total = sum(part.sum() for part in value) if isinstance(value, tuple) else value.sum()
    (gradient,) = torch.autograd.grad(total, x)
    return [total.detach().double().cpu(), gradient.double().cpu()]
