"""How a run ends that does not get to its last step: saved, with a reason, and raising what ended it."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from aepo.run.checkpoint import CheckpointError, checkpoint_path
from aepo.run.log import RunLog


def end_early(
    error: BaseException,
    *,
    signalled: bool,
    run: Path,
    step: int,
    save: Callable[[], None],
    log: RunLog,
    console: Console,
) -> NoReturn:
    """Save the last finished step, whose weights and moments are the live ones, and raise: the error, or
    KeyboardInterrupt where a signal came, which a terminal sends to the engines' processes, too.

    save: writes the checkpoint of `step`, unless it is there.
    """
    interrupted = signalled or isinstance(error, KeyboardInterrupt)
    reason = None if interrupted else str(error) or type(error).__name__
    unsaved: BaseException | None = None
    if isinstance(error, CheckpointError):
        unsaved, reason = error, f"the state after step {step} is not saved: {error}"
    else:
        try:
            save()
            saved = checkpoint_path(run / "checkpoints", step)
            console.print(f"the state after step {step} is saved in {saved}", markup=False)
            console.print(f"go on with: aepo train --resume {shlex.quote(str(run))}", markup=False)
        except Exception as another:
            unsaved = another
            problem = f"the state after step {step} is not saved: {another}"
            print(f"warning: {problem}", file=sys.stderr)
            reason = "; ".join(filter(None, (reason, problem)))
    with contextlib.suppress(OSError):  # a full disk; the lock of the directory says that nothing runs there
        log.close("failed" if unsaved or not interrupted else "interrupted", reason)
    if unsaved is not None and interrupted:
        raise unsaved
    if interrupted and not isinstance(error, KeyboardInterrupt):
        raise KeyboardInterrupt from error
    raise error
