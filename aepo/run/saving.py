"""When a run saves its state: once for every step and evaluation of it, also where it ends early."""

from __future__ import annotations

import contextlib
import shlex
import sys
from typing import NoReturn

from aepo.run.checkpoint import CheckpointError
from aepo.run.checkpoints import Checkpoints
from aepo.run.display import Display
from aepo.run.log import RunLog
from aepo.run.records import fingerprints


class Saver:
    """saved_step: the checkpoint that the run goes on from."""

    def __init__(self, checkpoints: Checkpoints, log: RunLog, display: Display, saved_step: int | None) -> None:
        self._checkpoints, self._log, self._display = checkpoints, log, display
        self._run = log.directory.path
        self._saved = None if saved_step is None else (saved_step, log.heldout_success(saved_step))

    def save(self, step: int) -> None:
        """The checkpoint of the last finished step, unless it is there. CheckpointError: it cannot be written."""
        success = self._log.heldout_success(step)
        if self._saved == (step, success):
            return
        self._display.stage("checkpoint")
        self._log.flush()  # a checkpoint is never ahead of the records
        self._checkpoints.save(step, success, fingerprints(self._run))
        self._saved = (step, success)

    def end_early(self, error: BaseException, step: int, *, signalled: bool) -> NoReturn:
        """Save the last finished step, whose weights and moments are the live ones, and raise: the error, or
        KeyboardInterrupt where a signal came, which a terminal sends to the engines' processes, too."""
        interrupted = signalled or isinstance(error, KeyboardInterrupt)
        reason = None if interrupted else str(error) or type(error).__name__
        unsaved: BaseException | None = None
        if isinstance(error, CheckpointError):
            unsaved, reason = error, f"the state after step {step} is not saved: {error}"
        else:
            try:
                self.save(step)
                self._say_how_to_go_on(step)
            except Exception as another:
                unsaved = another
                problem = f"the state after step {step} is not saved: {another}"
                print(f"warning: {problem}", file=sys.stderr)
                reason = "; ".join(filter(None, (reason, problem)))
        with contextlib.suppress(OSError):  # a full disk; the lock of the directory says that nothing runs there
            self._log.close("failed" if unsaved or not interrupted else "interrupted", reason)
        if unsaved is not None and interrupted:
            raise unsaved
        if interrupted and not isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise error

    def _say_how_to_go_on(self, step: int) -> None:
        saved, command = self._checkpoints.path(step), f"aepo train --resume {shlex.quote(str(self._run))}"
        self._display.console.print(f"the state after step {step} is saved in {saved}", markup=False)
        self._display.console.print(f"go on with: {command}", markup=False)
