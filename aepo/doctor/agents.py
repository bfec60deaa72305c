"""What an agent needs: the sandbox of its tool, questions, models that can be had without a download."""

from __future__ import annotations

from collections.abc import Iterator

from aepo.doctor.finding import Finding, short
from aepo.install import pip_install


def tools() -> Iterator[Finding]:
    """The Python tool's sandbox: its guarantees hold or there is no Python tool."""
    from aepo.agents.tools.python import sandbox_problem

    problem = sandbox_problem()
    promise = "no files, no network, no other process; time, memory and output are limited (tried just now)"
    yield Finding("tools", "python sandbox", "missing" if problem else "ok", problem or promise)


def tasks_and_models() -> Iterator[Finding]:
    """Questions and policies that can be had here without a download."""
    train_extra = pip_install("train")
    try:
        from aepo.agents.tasks.facts.task import FactsTask

        task = FactsTask()
        counts = f"{len(task.train)} training and {len(task.heldout)} held-out questions"
        yield Finding("tasks", task.name, "ok", counts)
    except ImportError as error:
        yield Finding("tasks", "facts", "missing", short(error), train_extra)
    try:
        import transformers  # noqa: F401, asked whether it imports

        yield Finding("models", "tiny", "ok", "trained here, the first time it is needed")
    except ImportError as error:
        yield Finding("models", "tiny", "missing", short(error), train_extra)
    from aepo.models import smollm2

    try:
        detail = f"{smollm2.gguf_file().stat().st_size / 2**20:.0f} MiB in its package, converted when first needed"
        yield Finding("models", "smollm2-135m-instruct", "ok", detail)
    except ModuleNotFoundError:
        yield Finding("models", "smollm2-135m-instruct", "missing", "its package is not installed", smollm2.INSTALL)
