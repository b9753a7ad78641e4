"""Images decoded by several processes, in order, with the same result whatever their number.

The processes run this module (`python -m tribute.data.image_workers`) and talk over pipes: batches of encoded images
in, pixels out. They are no `multiprocessing` pool, since that imports the user's main module again, which a script
without a guard does not survive. Nothing is pickled. Each dies with the pipe, so a killed parent leaves none behind.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

import numpy as np

from tribute.data.decoding import ImageRule, decode_image
from tribute.data.examination import EXAMINATION, examine_image
from tribute.errors import DataError

Encoded = bytes | DataError
"""The bytes of an image file, or why they could not be read."""

MAX_BATCH_IMAGES = 256
MAX_BATCH_BYTES = 1 << 25
# Below this many images the start of the processes, 0.3 s each, is not earned back.
MIN_IMAGES_TO_START = 1024


@dataclass(frozen=True)
class Answer:
    """What became of a batch of images.

    Attributes:
        array: One entry per image: `(n_images, height, width, channels)` uint8 pixels, or `(n_images,)` records of
            `examination.EXAMINATION`. Entries of images that failed are zero.
        failures: What is wrong, by position in the batch.
    """

    array: np.ndarray[Any, Any]
    failures: dict[int, str]


def default_n_workers() -> int:
    """Processors that this process may use, at most 8: then reading is what takes the time."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def process_images(
    encoded: Iterable[Encoded], n_images: int, rule: ImageRule | None, *, n_workers: int | None = None
) -> Iterator[Answer]:
    """Decode images by `rule`, or examine them if it is None, and yield the answers in order.

    Args:
        encoded: The images; read as far ahead as the processes need, a few batches of 32 MiB.
        n_images: How many there are, to decide whether processes are worth their start.
        rule: What pixels become; None examines (`tribute.data.examination`).
        n_workers: Processes; None is `default_n_workers()`. 1 works in this process. Never changes the answers.

    Raises:
        DataError: A process ended before its work was done.
    """
    batches = _batches(encoded, _answer_bytes(rule))
    n_workers = default_n_workers() if n_workers is None else n_workers
    if n_workers == 1 or n_images < MIN_IMAGES_TO_START or not sys.executable:
        yield from (_process_batch(batch, rule) for batch in batches)
        return
    with ExitStack() as stack:
        idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        for _ in range(n_workers):
            process = _start()
            stack.callback(_stop, process)
            idle.put(process)
        pool = stack.enter_context(ThreadPoolExecutor(n_workers))
        pending: deque[Future[Answer]] = deque()
        # Undone work is dropped before the pool waits for its threads, so an error shows at once.
        stack.callback(lambda: [future.cancel() for future in pending])
        for batch in batches:
            pending.append(pool.submit(_ask, idle, batch, rule))
            if len(pending) > 2 * n_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _batches(encoded: Iterable[Encoded], answer_bytes: int) -> Iterator[list[Encoded]]:
    """Runs of images that are small both encoded and decoded."""
    batch: list[Encoded] = []
    n_bytes = 0
    for item in encoded:
        size = max(answer_bytes, len(item) if isinstance(item, bytes) else 0)
        if batch and (len(batch) == MAX_BATCH_IMAGES or n_bytes + size > MAX_BATCH_BYTES):
            yield batch
            batch, n_bytes = [], 0
        batch.append(item)
        n_bytes += size
    if batch:
        yield batch


def _entry(rule: ImageRule | None) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Type and shape of the answer to one image."""
    return (EXAMINATION, ()) if rule is None else (np.dtype(np.uint8), rule.shape)


def _answer_bytes(rule: ImageRule | None) -> int:
    dtype, shape = _entry(rule)
    return dtype.itemsize * int(np.prod(shape, dtype=np.int64))


def _process_batch(batch: Sequence[Encoded], rule: ImageRule | None) -> Answer:
    """The work itself, in whichever process."""
    dtype, shape = _entry(rule)
    array = np.zeros((len(batch), *shape), dtype=dtype)
    failures: dict[int, str] = {}
    for i, item in enumerate(batch):
        try:
            if isinstance(item, DataError):
                raise item
            array[i] = examine_image(item) if rule is None else decode_image(item, rule)
        except DataError as error:
            failures[i] = str(error)
    return Answer(array, failures)


# The protocol: a length and JSON, then as many raw bytes as the JSON says.


def _start() -> subprocess.Popen[bytes]:
    """A worker process that imports the package from where this one did."""
    package_parent = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "tribute.data.image_workers"]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Close the pipes, which ends the process, and wait for it."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # it has died with bytes still to be sent
                pipe.close()
    process.wait()


def _ask(idle: SimpleQueue[subprocess.Popen[bytes]], batch: Sequence[Encoded], rule: ImageRule | None) -> Answer:
    """Send a batch to a free process and wait for its answer."""
    process = idle.get()
    try:
        sizes = [len(item) if isinstance(item, bytes) else str(item) for item in batch]
        request = {"rule": None if rule is None else asdict(rule), "sizes": sizes}
        _send(process.stdin, request, [item for item in batch if isinstance(item, bytes)])
        answer = _receive_json(process.stdout)
        if answer is None:
            raise EOFError
        dtype, shape = _entry(rule)
        array = np.empty((len(batch), *shape), dtype=dtype)
        _receive_into(process.stdout, memoryview(array.view(np.uint8).reshape(-1).data))
    except (OSError, EOFError) as error:
        with suppress(subprocess.TimeoutExpired):  # its pipes are closed, but it may not have been waited for
            process.wait(timeout=5)
        raise DataError(
            f"a process that decodes images ended early (status {process.poll()}), perhaps for lack of memory; "
            "run the same again with fewer processors"
        ) from error
    finally:
        idle.put(process)  # a dead one, too: nobody may wait for ever
    return Answer(array, {int(i): message for i, message in answer["failures"].items()})


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer requests until the pipe closes."""
    while (request := _receive_json(requests)) is not None:
        rule = None if request["rule"] is None else ImageRule(**request["rule"])
        batch = [DataError(size) if isinstance(size, str) else _receive(requests, size) for size in request["sizes"]]
        answer = _process_batch(batch, rule)
        _send(answers, {"failures": answer.failures}, [answer.array.tobytes()])


def _send(pipe: IO[bytes] | None, header: dict[str, Any], parts: Sequence[bytes]) -> None:
    if pipe is None:
        raise EOFError
    text = json.dumps(header).encode()
    pipe.write(struct.pack("<Q", len(text)) + text)
    for part in parts:
        pipe.write(part)
    pipe.flush()


def _receive_json(pipe: IO[bytes] | None) -> dict[str, Any] | None:
    """The next header, or None at the end."""
    length = b"" if pipe is None else pipe.read(8)
    return json.loads(_receive(pipe, struct.unpack("<Q", length)[0])) if len(length) == 8 else None


def _receive(pipe: IO[bytes] | None, n_bytes: int) -> bytes:
    content = bytearray(n_bytes)
    _receive_into(pipe, memoryview(content))
    return bytes(content)


def _receive_into(pipe: IO[bytes] | None, view: memoryview) -> None:
    while len(view):
        n_read = 0 if pipe is None else pipe.readinto(view)  # type: ignore[attr-defined]
        if not n_read:
            raise EOFError
        view = view[n_read:]


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
