"""The thread that calls TVM for a device.

TVM's functions are for one thread at a time, so each device has one thread that makes all calls:

- Calls from several Python threads run one after the other, in the order in which they were made.
- A signal's exception, such as KeyboardInterrupt, ends the wait of the caller and not the call.
- A fork waits until no call runs. The child starts a thread of its own when it needs one.
- The end of the interpreter waits for the call that runs, and none starts after it. Python would end a thread that
  comes back from TVM by then, and C++ answers that with abort().
"""

from __future__ import annotations

import atexit
import os
from _thread import LockType, allocate_lock
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread, get_ident
from typing import Any, ParamSpec, TypeVar

from tvm_attn.errors import DeviceError

P = ParamSpec("P")
R = TypeVar("R")


class Worker:
    """One device's thread, which starts with the first call; `worker` returns it.

    It uses only operations that no signal can split: those of the queue, and `with` on a lock.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._reset()

    def _reset(self) -> None:
        self._calls: SimpleQueue[_Call] = SimpleQueue()
        self._ident: int | None = None  # of the thread
        self._is_started = False
        self._starting, self._running, self._parked = allocate_lock(), allocate_lock(), _taken_lock()
        self._holds: dict[int, LockType] = {}

    def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Calls a function in the thread, after earlier calls; within such a call, immediately.

        Raises:
            DeviceError: the interpreter is ending.
        """
        if get_ident() == self._ident:
            return function(*args, **kwargs)
        refuse_at_the_end()
        self._start()
        call = _Call(lambda: function(*args, **kwargs))
        self._calls.put(call)
        result: R = call.wait()
        return result

    def post(self, function: Callable[[], object]) -> None:
        """Calls a function in the thread, after earlier calls, and does not wait for it. It must not raise.

        Raises:
            DeviceError: the interpreter is ending.
        """
        refuse_at_the_end()
        self._start()
        self._calls.put(_Call(function))

    def _start(self) -> None:
        if not self._is_started:
            with self._starting:
                if not self._is_started:
                    Thread(target=self._loop, name=f"tvm_attn {self._device}", daemon=True).start()
                    self._is_started = True

    def _loop(self) -> None:
        # A signal between the last two lines of `_start` may cause a second thread: it waits here.
        with self._running:
            self._ident = get_ident()
            while True:
                call = self._calls.get()
                if _ending is not None:
                    self._parked.release()
                    _taken_lock().acquire()  # forever
                call.run()
                del call  # with its arguments and results

    def before_fork(self) -> None:
        """Waits until no call runs, and lets none start."""
        if self._is_started and _ending is None and self._ident != get_ident():
            held, resume = _taken_lock(), _taken_lock()
            self._holds[get_ident()] = resume

            def hold() -> None:
                held.release()
                resume.acquire()

            self._calls.put(_Call(hold))
            held.acquire()

    def after_fork_in_parent(self) -> None:
        """Lets calls run again."""
        resume = self._holds.pop(get_ident(), None)
        if resume is not None:
            resume.release()

    def after_fork_in_child(self) -> None:
        """Forgets the thread, which does not exist in the child."""
        self._reset()

    def park(self) -> None:
        """Waits until the running call is over; no other starts, as `_ending` is set."""
        if self._is_started and self._ident != get_ident():
            self._calls.put(_Call(lambda: None))
            self._parked.acquire()


class _Call:
    """A function for the thread to call, and its outcome."""

    __slots__ = ("_done", "_error", "_function", "_result")

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function: Callable[[], Any] | None = function
        self._done = _taken_lock()
        self._result: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        assert self._function is not None
        try:
            self._result = self._function()
        except BaseException as error:
            self._error = error
        self._function = None
        self._done.release()

    def wait(self) -> Any:
        self._done.acquire()
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # it refers to this frame
        return self._result


def _taken_lock() -> LockType:
    lock = allocate_lock()
    lock.acquire()
    return lock


_workers: dict[str, Worker] = {}
_ending: int | None = None
"""The thread that is ending the interpreter, if any."""


def worker(device: str) -> Worker:
    """The worker of a device, e.g. "cpu" or "cuda:0"."""
    return _workers.setdefault(device, Worker(device))


def refuse_at_the_end() -> None:
    """Raises DeviceError in the thread that ends the interpreter: no more calls are made."""
    if get_ident() == _ending:
        raise DeviceError("Python is ending and runs no more models; finish earlier")


def _for_all(action: Callable[[Worker], None]) -> None:
    for each in list(_workers.values()):
        action(each)


def _end() -> None:
    global _ending
    _ending = get_ident()
    _for_all(Worker.park)


atexit.register(_end)
os.register_at_fork(
    before=lambda: _for_all(Worker.before_fork),
    after_in_parent=lambda: _for_all(Worker.after_fork_in_parent),
    after_in_child=lambda: _for_all(Worker.after_fork_in_child),
)
