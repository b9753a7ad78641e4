"""Ctrl-C and SIGTERM: the step in hand is abandoned, what was claimed is given back, and it is over within seconds."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tribute import pulse

SIGNALS = (signal.SIGINT, signal.SIGTERM)
EXIT_CODE = 130
GRACE_SECONDS = 9.0
"""Time to clean up; then the process ends as it is, which a store and a run folder survive as they survive a crash."""

MESSAGE = "interrupted; run the same command again to continue where it stopped"


@contextmanager
def stop_on_signals(grace_seconds: float = GRACE_SECONDS) -> Iterator[None]:
    """Let the first signal raise `KeyboardInterrupt` in the main thread; further ones leave the clean-up alone.

    The exception of a signal handler may be lost inside a callback of C code; the next `pulse.beat` raises it again.
    A call of C code that takes longer than the time to clean up never lets Python handle the signal: a thread that
    the C library wakes then ends the process.

    Args:
        grace_seconds: Until that thread ends the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stopped_at: list[float] = []

    def stop(_signal: int, _frame: FrameType | None) -> None:
        pulse.request_stop()
        now = time.monotonic()
        if not stopped_at:
            stopped_at.append(now)
            raise KeyboardInterrupt
        # Another one while the claims are given back: that is under way already.

    woken, wakes = socket.socketpair()
    wakes.setblocking(False)
    over = threading.Event()
    guard = threading.Thread(target=_end_late, args=(woken, over, grace_seconds), name="signals", daemon=True)
    pulse.clear_stop()
    before = {number: signal.signal(number, stop) for number in SIGNALS}
    _replaced.update(before)
    previous_wakeup = signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    guard.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        _replaced.clear()
        over.set()
        wakes.close()
        guard.join()
        woken.close()
        pulse.clear_stop()


def _end_late(woken: socket.socket, over: threading.Event, grace_seconds: float) -> None:
    """End the process when it still runs some time after the first signal."""
    while received := woken.recv(16):
        if any(number in SIGNALS for number in received):
            if over.wait(grace_seconds):
                return
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{MESSAGE}\n".encode())
            os._exit(EXIT_CODE)


_replaced: dict[signal.Signals, Any] = {}
"""The handlers of before, while this module has its own."""


def _let_go_in_child() -> None:
    """Give a forked child the handlers of before: a signal that ends it would wake the thread that ends its parent."""
    if _replaced:
        signal.set_wakeup_fd(-1)
        for number, handler in _replaced.items():
            signal.signal(number, handler)


os.register_at_fork(after_in_child=_let_go_in_child)
