"""The pulse of long work: one beat per step, so that whoever watches knows that it goes on, and can end it.

Training, sampling, features and encoding call `beat` at every step. An executor asks `seconds_since_beat` and takes
a process whose pulse has stopped for one that hangs. `request_stop` lets the next beat raise `KeyboardInterrupt`, also
where the exception that a signal raised was lost on its way, as it may be inside a callback of C code.
"""

from __future__ import annotations

import time

_last_beat = time.monotonic()
_n_beats = 0
_stop_requested = False


def beat() -> None:
    """Say that work goes on.

    Raises:
        KeyboardInterrupt: This process was asked to stop.
    """
    global _last_beat, _n_beats
    if _stop_requested:
        raise KeyboardInterrupt
    _last_beat = time.monotonic()
    _n_beats += 1


def n_beats() -> int:
    """Beats of this process so far."""
    return _n_beats


def seconds_since_beat() -> float:
    """Seconds since the last beat, or since this module was imported."""
    return time.monotonic() - _last_beat


def request_stop() -> None:
    """Let the next beat raise `KeyboardInterrupt`."""
    global _stop_requested
    _stop_requested = True


def clear_stop() -> None:
    """Take `request_stop` back."""
    global _stop_requested
    _stop_requested = False
