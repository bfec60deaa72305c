"""The event loop that replicas live on: a thread of its own, because an `AsyncLLM` is bound to the loop that it was
started on, and a trainer runs one loop per rollout.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, TypeVar

from aepo.interrupt import heard_by_main_thread

END_SECONDS = 30.0  # for engines to shut down, and for coroutines to end after they were cancelled

Result = TypeVar("Result")


class LoopThread:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="aepo-vllm", daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Start it there; cancelling the future cancels the work. RuntimeError: closed."""
        if self._closed:
            work.close()
            raise RuntimeError("the engine is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, Result], timeout: float | None = None) -> Result:
        """Wait for it, in this thread; it is cancelled if that ends early. TimeoutError: after `timeout` seconds."""
        future = self.submit(work)
        try:
            with heard_by_main_thread():
                return future.result(timeout)
        except FutureTimeoutError:  # its own name before Python 3.11
            future.cancel()
            raise TimeoutError from None
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel what still runs, wait for it, and end the thread. A second call does nothing."""
        if not self._closed:
            self._closed = True
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(END_SECONDS)  # one that blocks the loop stays behind, as a daemon

    def _serve(self) -> None:
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(asyncio.sleep(0))  # what was submitted just before becomes a task
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            if tasks:
                self._loop.run_until_complete(asyncio.wait(tasks, timeout=END_SECONDS))
        finally:
            self._loop.close()
