"""The run folder of a study: its settings, which must stay what they are, and the process that writes into it."""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from tribute.config import StudyConfig
from tribute.errors import MixedResultsError, StoreError
from tribute.files import room_sentence, write_whole

logger = logging.getLogger(__name__)

LOCK_NAME = "run.lock"
OWNER_NAME = "run.owner.json"

WAIT_OR_STOP_IT = "Wait until it has ended, or stop it with Ctrl-C or SIGTERM: tribute run goes on from there later"
"""What to do for commands that change what is there and do not wait themselves."""

_MAY_CHANGE = {
    "outdir",
    "codec",
    "n_threads",
    "estimator",
    "features.weights",
    "features.models",
    "features.revisions",
    "features.aesthetic_head",
    "features.batch_size",
    "fit.n_coalitions",
    "fit.until_interval",
    "fit.leave_one_out",
    "fit.n_end_points",
    "runtime.compile",
    "runtime.compile_backend",
    "runtime.channels_last",
    "runtime.gradient_checkpointing",
    "test.n_coalitions",
    "test.opt_seeds",
    "pilot.n_coalitions",
    "pictures.n_images",
    "execution.executor",
    "execution.workers",
    "execution.gpus_per_worker",
    "execution.address",
    "execution.stall_seconds",
    "max_device_hours",
}
"""Settings under which a study can be continued: they add evaluations, or change how results are computed or read."""


def check_same_study(config: StudyConfig) -> None:
    """Compare settings with those in the run folder, where it has any.

    Raises:
        MixedResultsError: They are of another study.
    """
    path = config.run_dir / "config.yaml"
    if path.exists():
        saved = _flat(StudyConfig.from_yaml(path).model_dump(mode="json"))
        asked = _flat(config.model_dump(mode="json"))
        differing = [key for key in asked if key not in _MAY_CHANGE and saved.get(key) != asked[key]]
        if differing:
            lines = "; ".join(f"{key}: saved {saved.get(key)!r}, asked {asked[key]!r}" for key in differing)
            raise MixedResultsError(
                f"{config.run_dir} holds a study with other settings: {lines}. "
                "Restore them, or give the study another name to start afresh"
            )


def claim_run_dir(config: StudyConfig) -> None:
    """Write the resolved settings into the run folder, or compare them with those that are there."""
    check_same_study(config)
    try:
        write_whole(config.run_dir / "config.yaml", config.to_yaml())
    except OSError as error:
        raise _not_writable(config.run_dir, error) from error


class RunLock:
    """Lets one process at a time write into a run folder; a context manager that is entered without the lock.

    The operating system lets go of the lock when its process ends, however it ends.

    Args:
        run_dir: The run folder; made when the lock is taken.
        wait: Wait for another process instead of refusing.
        on_wait: Called once, with what is waited for.
        remedy: What the refused caller may do, the end of the message.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        wait: bool = False,
        on_wait: Callable[[str], None] | None = None,
        remedy: str = (
            "Wait until it has ended, or give --wait; to share the measuring among processes, use workers "
            "(docs/clusters.md)"
        ),
    ) -> None:
        self.run_dir = run_dir
        self.wait = wait
        self.on_wait = on_wait
        self.remedy = remedy
        self._lock: FileLock | None = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock; nothing happens when this object has it already.

        Raises:
            StoreError: Another process has it and `wait` is False, or the folder is not writable.
        """
        if self._lock is not None:
            return
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.run_dir / LOCK_NAME)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                holder = f"{self.run_dir} is in use by {self.owner()}"
                if not self.wait:
                    raise StoreError(
                        f"{holder}, and one process at a time may write into a run folder. {self.remedy}"
                    ) from None
                if self.on_wait is not None:
                    self.on_wait(f"{holder}; waiting until it lets go")
                lock.acquire(poll_interval=0.5)
            self._lock = lock
            owner = {"host": platform.node(), "pid": os.getpid(), "since": datetime.now(UTC).isoformat()}
            write_whole(self.run_dir / OWNER_NAME, json.dumps(owner))
        except NotImplementedError:
            logger.warning("%s is on a file system without locks; do not run a study there twice at once", self.run_dir)
        except OSError as error:
            self.release()
            raise _not_writable(self.run_dir, error) from error

    def release(self) -> None:
        """Let go of the lock, where this object has it."""
        if self._lock is not None:
            (self.run_dir / OWNER_NAME).unlink(missing_ok=True)
            self._lock.release()
            self._lock = None

    def owner(self) -> str:
        """Who has, or had last, the lock, in words."""
        try:
            found = json.loads((self.run_dir / OWNER_NAME).read_text())
            return f"process {found['pid']} on {found['host']} since {found['since'][:19]} UTC"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"


def _not_writable(run_dir: Path, error: OSError) -> StoreError:
    return StoreError(
        f"the run folder {run_dir} is not writable ({error}; {room_sentence(run_dir)}); make room or set another outdir"
    )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted names; a mapping with free keys stays one value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key not in ("sampling", "weights", "models", "revisions"):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
