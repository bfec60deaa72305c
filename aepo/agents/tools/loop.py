"""An event loop in a thread of its own, where coroutines of tools live for as long as their owner."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
import threading
from collections.abc import Awaitable
from typing import Generic, TypeVar

Value = TypeVar("Value")
END_SECONDS = 5.0  # for coroutines to end after they were cancelled


class Running(Generic[Value]):
    """A coroutine on a `LoopThread`."""

    def __init__(self, awaitable: Awaitable[Value], loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._done: concurrent.futures.Future[Value] = concurrent.futures.Future()
        self._task: asyncio.Task[None] | None = None
        self._cancelled = False
        loop.call_soon_threadsafe(self._begin, awaitable)

    def result(self, timeout: float | None = None) -> Value:
        """What it returned or raised, once it has really ended; not on the loop's own thread."""
        return self._done.result(timeout)

    def cancel(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and has cancelled it
            self._loop.call_soon_threadsafe(self._cancel)

    def _begin(self, awaitable: Awaitable[Value]) -> None:
        self._task = self._loop.create_task(self._run(awaitable))
        self._task.add_done_callback(lambda _: self._ended(awaitable))
        if self._cancelled:
            self._cancel()

    def _cancel(self) -> None:
        self._cancelled = True
        if self._task is not None:
            self._task.cancel()

    async def _run(self, awaitable: Awaitable[Value]) -> None:
        try:
            self._done.set_result(await awaitable)
        except BaseException as error:  # a SystemExit of one coroutine must not end the loop of all
            self._done.set_exception(error)

    def _ended(self, awaitable: Awaitable[Value]) -> None:
        if not self._done.done():  # cancelled before it began
            if inspect.iscoroutine(awaitable):
                awaitable.close()
            self._done.set_exception(asyncio.CancelledError())


class LoopThread:
    """Starts with the first coroutine. The thread is a daemon: it does not keep the process from ending."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def start(self, awaitable: Awaitable[Value]) -> Running[Value]:
        with self._lock:
            if self._closed:
                raise RuntimeError(f"the event loop of {self._name} is closed")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._serve, args=(self._loop,), name=self._name, daemon=True)
                self._thread.start()
            return Running(awaitable, self._loop)

    def close(self) -> None:
        """Cancel what still runs, and end the thread. May be called twice."""
        with self._lock:
            self._closed = True
            loop, thread = self._loop, self._thread
        if loop is None or thread is None or not thread.is_alive():
            return
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(loop.stop)
        thread.join(END_SECONDS + 1)  # one that blocks the loop stays behind, as a daemon

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
            tasks = asyncio.all_tasks(loop)
            for task in tasks:
                task.cancel()
            if tasks:
                loop.run_until_complete(asyncio.wait(tasks, timeout=END_SECONDS))
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            loop.close()
