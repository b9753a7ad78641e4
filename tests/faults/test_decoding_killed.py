"""A process that decodes images and is killed ends the reading with an error, never with silence."""

from __future__ import annotations

import io
import os
import signal
import subprocess
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tribute.data import image_workers
from tribute.data.decoding import ImageRule
from tribute.data.image_workers import Encoded, process_images
from tribute.errors import DataError

N_IMAGES = 240  # of which some are still to be sent when the first batch has come back


def encoded() -> list[Encoded]:
    """Images of some size, so that no pipe holds a batch of them."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return [buffer.getvalue()] * N_IMAGES


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that decode, as they are started; batches are small."""
    monkeypatch.setattr(image_workers, "MAX_BATCH_IMAGES", 12)
    monkeypatch.setattr(image_workers, "MIN_IMAGES_TO_START", 0)
    processes: list[subprocess.Popen[bytes]] = []
    start = image_workers._start

    def noted() -> subprocess.Popen[bytes]:
        processes.append(start())
        return processes[-1]

    monkeypatch.setattr(image_workers, "_start", noted)
    return processes


@pytest.mark.parametrize("moment", ["before the first batch", "while a batch is sent", "while it answers", "later"])
def test_a_killed_process_is_an_error(
    started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def kill() -> None:
        os.kill(started[0].pid, signal.SIGKILL)

    send, receive = image_workers._send, image_workers._receive_json
    killed: list[str] = []

    def killing_send(pipe: Any, header: Any, parts: Any) -> None:
        if pipe is started[0].stdin and moment == "before the first batch" and not killed:
            killed.append(moment)
            kill()
            started[0].wait()
        if pipe is started[0].stdin and moment == "while a batch is sent" and not killed:
            killed.append(moment)
            pipe.write(parts[0][:10])
            pipe.flush()
            kill()
        send(pipe, header, parts)

    def killing_receive(pipe: Any) -> Any:
        if pipe is started[0].stdout and moment == "while it answers" and not killed:
            killed.append(moment)
            kill()
        return receive(pipe)

    monkeypatch.setattr(image_workers, "_send", killing_send)
    monkeypatch.setattr(image_workers, "_receive_json", killing_receive)
    with pytest.raises(DataError, match=r"ended early \(status -9\).*run the same again"):
        for number, _ in enumerate(process_images(encoded(), N_IMAGES, ImageRule(64), n_workers=2)):
            if number == 1 and moment == "later":
                for process in started:
                    os.kill(process.pid, signal.SIGKILL)
    assert all(process.returncode is not None for process in started)  # none is left, not even as a zombie


def test_a_parent_that_ends_early_leaves_no_process(started: list[subprocess.Popen[bytes]]) -> None:
    answers = process_images(encoded(), N_IMAGES, ImageRule(64), n_workers=2)
    next(answers)
    answers.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert len(started) == 2 and all(process.returncode is not None for process in started)
