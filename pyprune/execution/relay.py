"""Forward passes that take turns: each in a thread of its own, of which only one moves at a time.

What a pass runs under (gradient mode, function modes, the stack of a model's own code) belongs to its thread, so that
many of them can stand still in the middle of the same block and go on later, whatever the block is.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable
from typing import Any

import torch


class Abandoned(Exception):
    """Raised inside a pass that is not to go on."""


class NoThread(Exception):
    """The system gives this process no further thread."""


class Pass:
    """A function that moves only inside :meth:`step`, from one :meth:`wait` of its own to the next."""

    def __init__(self, work: Callable[[], Any], device: torch.device):
        """work: runs in the thread, in the context that this is called in. device: where it computes."""
        self.result: Any = None
        """What the function returned, once it is done."""
        self.done = False
        self._error: BaseException | None = None
        self._abandoned = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._threads = torch.get_num_threads()
        self._device = device
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._thread = threading.Thread(
            target=contextvars.copy_context().run, args=(self._run, work), daemon=True, name="pyprune-pass"
        )

    def step(self) -> None:
        """Let it move until it waits or is done. Raises what it raised."""
        if self._thread.ident is None:
            try:
                self._thread.start()
            except RuntimeError as error:
                raise NoThread(str(error)) from error
        else:
            self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raised, self._error = self._error, None
            raise raised

    def wait(self) -> None:
        """Called inside the function: stand still until the next :meth:`step`."""
        self._stopped.release()
        self._go.acquire()
        if self._abandoned:
            raise Abandoned

    def abandon(self) -> None:
        """End it where it stands; its thread is gone when this returns."""
        self._abandoned = True
        if self._thread.ident is not None:
            self._go.release()
            self._thread.join()

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            torch.set_num_threads(self._threads)  # a new thread would take the environment's number
            with self._on_device():
                self.result = work()
        except Abandoned:
            pass
        except BaseException as error:
            self._error = error
        self.done = True
        self._stopped.release()

    @contextlib.contextmanager
    def _on_device(self):
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield
