"""Ctrl-C and SIGTERM: over at once, status 130, everything claimable, and the same values when it is run again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_study import SilentListener
from workshop import credit_of, n_calls, start_run, undisturbed, values_of, wait_until_held

from tribute import pulse
from tribute.cli.signals import stop_on_signals
from tribute.config import StudyConfig
from tribute.store.records import Store
from tribute.study.run import run_study

MakeStudy = Callable[..., StudyConfig]


@pytest.mark.parametrize(("number", "hold_at"), [(signal.SIGTERM, 4), (signal.SIGINT, 1)])
def test_a_signal_ends_a_run_that_can_be_continued(
    make_study: MakeStudy, workshop: Path, number: signal.Signals, hold_at: int
) -> None:
    values, credit = undisturbed(workshop, make_study)
    config = make_study(behaviors=["counted:held", "counted:contrast"])
    (workshop / "hold_at").write_text(str(hold_at))
    process = start_run(config, workshop)
    wait_until_held(process)
    with Store.open(config.db_url, create=False) as store:
        assert store.counts()["running"] == 1
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.strip().splitlines()[-1] == "interrupted; run the same command again to continue where it stopped"
    assert "Traceback" not in error
    with Store.open(config.db_url, create=False) as store:
        counts = store.counts()
        assert (counts["running"], counts["finished"], counts["failed"]) == (0, hold_at - 1, 0)
        assert sum(item.attempts for item in store.find()) == hold_at - 1

    again = run_study(config, SilentListener())
    assert credit_of(again) == credit
    assert values_of(config) == values
    assert n_calls(workshop) == 8 + 1  # the one in hand is measured twice, nothing else


def test_further_signals_leave_the_clean_up_alone() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    cleaned_up = False
    with pytest.raises(KeyboardInterrupt), stop_on_signals():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            cleaned_up = True
    assert cleaned_up
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    pulse.beat()  # the request to stop does not outlive the command


def test_an_exception_that_is_lost_on_its_way_is_raised_by_the_next_beat() -> None:
    with stop_on_signals():
        with pytest.raises(KeyboardInterrupt):  # as a callback of C code would swallow it
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            pulse.beat()


STUCK = """
import ctypes
from tribute.cli.signals import stop_on_signals

libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)

def wait_in_c_code():
    print("stuck", flush=True)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)

with stop_on_signals(grace_seconds=0.01):
    try:
        wait_in_c_code()
    except KeyboardInterrupt:
        wait_in_c_code()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="locks a mutex of the C library twice")
def test_a_call_of_c_code_that_does_not_return_is_abandoned() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "stuck\n"
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again" in error


FORKED = """
import os
import signal
import threading
from tribute.cli.signals import stop_on_signals

reads, writes = os.pipe()
with stop_on_signals(grace_seconds=0.01):
    child = os.fork()
    if child == 0:
        os.write(writes, b"!")
        threading.Event().wait()
    os.read(reads, 1)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    print(os.WIFSIGNALED(status) and os.WTERMSIG(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_signal_to_a_forked_child_ends_the_child_alone() -> None:
    """As `multiprocessing` sends it to the workers of a behavior; child and parent share the socket of the guard."""
    found = subprocess.run(
        [sys.executable, "-c", FORKED],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=60,
        check=False,
    )
    assert (found.returncode, found.stdout.strip()) == (0, str(int(signal.SIGTERM))), found.stderr
