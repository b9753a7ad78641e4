"""Working through the pending evaluations of a store."""

from __future__ import annotations

import importlib.util
import logging
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from tribute import pulse
from tribute.config import ExecutionConfig
from tribute.errors import ConfigError, StoreError, TributeError
from tribute.store.records import ClaimedEvaluation, Store
from tribute.study.value_function import Evaluation
from tribute.types import CoalitionMask

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
BEATS_PER_LEASE = 4
MAX_SECONDS_BETWEEN_BEATS = 60.0
CONNECT_SECONDS = 10.0


class Measure(Protocol):
    """v(S) from the method, the coalition `(n_contributors,)` and the training seed."""

    def __call__(self, method: str, coalition_mask: CoalitionMask, *, opt_seed: int) -> Evaluation: ...


def always() -> bool:
    """Nothing limits the work."""
    return True


class Executor(Protocol):
    """Measures evaluations until none is left; set up once, it serves every call of `run`."""

    @property
    def n_workers(self) -> int:
        """How many evaluations it measures at a time."""
        ...

    def run(
        self,
        store: Store,
        study_id: int,
        *,
        evaluation_ids: Sequence[int] | None = None,
        on_done: Callable[[ClaimedEvaluation, Evaluation], None],
        go_on: Callable[[], bool] = always,
    ) -> int:
        """Work through evaluations by priority.

        Args:
            store: Only this process writes to it.
            study_id: Whose evaluations.
            evaluation_ids: Only these; None takes all of the study.
            on_done: Called in this process after each one that was measured and recorded.
            go_on: Asked before each one is begun; False ends the work, those in hand included in what is finished.

        Returns:
            Number of evaluations finished here.
        """
        ...

    def close(self) -> None:
        """Let go of processes and memory."""
        ...


def check_execution(execution: ExecutionConfig) -> None:
    """Refuse, before anything is trained, an executor that this installation does not have.

    Raises:
        ConfigError: Ray is asked for and not installed, nothing listens at its address, or there are several workers
            without it.
    """
    if execution.executor == "ray":
        if importlib.util.find_spec("ray") is None:
            raise ConfigError(
                "execution.executor: ray is not installed, and the executor ray needs it; "
                "pip install 'tribute[cluster]', or set executor: serial"
            )
        host, colon, port = (execution.address or "").removeprefix("ray://").rpartition(":")
        if colon:
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
            except (OSError, ValueError, OverflowError) as error:
                raise ConfigError(
                    f"execution.address: expected auto, HOST:6379 or ray://HOST:10001 of a cluster that runs; nothing "
                    f"answers at {execution.address} ({error}). Start one (docs/clusters.md), or leave the address out"
                ) from error
    elif execution.workers != 1 or execution.address is not None or execution.gpus_per_worker is not None:
        raise ConfigError(
            "execution: workers, gpus_per_worker and address are settings of the executor ray; found executor "
            f"serial with workers {execution.workers}, gpus_per_worker {execution.gpus_per_worker}, address "
            f"{execution.address}. Set executor: ray (--executor ray), or leave them out"
        )


class Ledger:
    """What the evaluations of one call of `Executor.run` become in the store: claimed, finished, failed, given back.

    Args:
        store: Holds them.
        study_id: Their study.
        evaluation_ids: Only these; None takes all of the study.
        definitions: Unit, direction and variant of the behaviors, stored with every value.
        max_attempts: How often an evaluation that fails is tried in all; then it is set aside.
    """

    def __init__(
        self,
        store: Store,
        study_id: int,
        evaluation_ids: Sequence[int] | None,
        *,
        definitions: Mapping[str, Mapping[str, Any]],
        max_attempts: int = MAX_ATTEMPTS,
    ) -> None:
        self.store = store
        self.study_id = study_id
        self.evaluation_ids = evaluation_ids
        self.definitions = definitions
        self.max_attempts = max_attempts

    def claim(self) -> ClaimedEvaluation | None:
        """The next one by priority; None when none is to be had."""
        return self.store.claim(self.study_id, evaluation_ids=self.evaluation_ids)

    def finish(self, claimed: ClaimedEvaluation, evaluation: Evaluation, provenance: Mapping[str, Any]) -> bool:
        """Record a result; False where it cannot count, which was logged.

        Raises:
            StoreError: The store does not answer.
        """
        try:
            self.store.finish(
                claimed,
                evaluation.behaviors,
                seconds=evaluation.seconds,
                provenance={**provenance, "n_steps": evaluation.n_steps},
                definitions=self.definitions,
            )
        except StoreError:
            if self._still_has(claimed):
                raise
            return False
        except TributeError as error:  # e.g. a value that is not finite
            self.fail(claimed, str(error))
            return False
        return True

    def fail(self, claimed: ClaimedEvaluation, reason: str) -> None:
        """Count a failed attempt; the evaluation is tried again, or set aside after the last one.

        Raises:
            StoreError: The store does not answer.
        """
        logger.warning("Evaluation %s failed: %s", claimed.spec, reason)
        try:
            self.store.fail(claimed, reason, max_attempts=self.max_attempts)
        except StoreError:
            if self._still_has(claimed):
                raise

    def release(self, claimed: ClaimedEvaluation) -> None:
        """Give an evaluation back, uncounted."""
        self.store.release(claimed)

    def _still_has(self, claimed: ClaimedEvaluation) -> bool:
        """Whether a claim holds; one that was lost while its evaluation was measured is logged."""
        if self.store.heartbeat(claimed):
            return True
        logger.warning("Evaluation %s was measured by another process, too; going on", claimed.spec)
        return False


def seconds_between_beats(claimed: ClaimedEvaluation) -> float:
    """How often the lease of a claim is extended; readers take the last time for a sign of life."""
    return min(claimed.lease_seconds / BEATS_PER_LEASE, MAX_SECONDS_BETWEEN_BEATS)


class Heartbeat:
    """Extends the lease of the evaluation in hand from a thread of its own, as long as this process's pulse beats.

    A process that hangs so loses its claim, and another one measures the evaluation.

    Args:
        store: Where the claim is; its connections are one per thread.
        claimed: The evaluation in hand.
        stall_seconds: Without a beat of the pulse for so long, the process is taken to hang.
    """

    def __init__(self, store: Store, claimed: ClaimedEvaluation, stall_seconds: float) -> None:
        self.store = store
        self.claimed = claimed
        self.stall_seconds = stall_seconds
        self._over = threading.Event()
        self._said = False
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(timeout=5.0)

    def _watch(self) -> None:
        while not self._over.wait(seconds_between_beats(self.claimed)):
            self.beat()

    def beat(self) -> bool:
        """Extend the lease, or see that the work stands still or that the claim is lost; whether it was extended."""
        seconds = pulse.seconds_since_beat()
        if seconds > self.stall_seconds:
            self._say(
                f"no step for {seconds:.0f} s (execution.stall_seconds: {self.stall_seconds:.0f}): the process hangs, "
                "and its evaluation may be measured by another one. If it does not go on, end it and run again"
            )
            return False
        try:
            extended = self.store.heartbeat(self.claimed)
        except StoreError as error:  # whoever records the result meets it again
            logger.debug("No heartbeat: %s", error)
            return False
        if extended:
            self._said = False
        elif not self._over.is_set():  # else it was recorded meanwhile
            self._say("another process has it now")
        return extended

    def _say(self, text: str) -> None:
        if not self._said:
            logger.warning("Evaluation %s: %s", self.claimed.spec, text)
            self._said = True


class SerialExecutor:
    """One warm process that claims, measures and records one evaluation after another.

    Args:
        measure: v(S) from the method, the coalition and `opt_seed`.
        definitions: Unit, direction and variant of the behaviors, stored with every value.
        provenance: Stored with every evaluation.
        max_attempts: How often an evaluation that fails is tried in all.
        stall_seconds: Without a step for so long, the process is taken to hang and loses its claim.
    """

    def __init__(
        self,
        measure: Measure,
        *,
        definitions: dict[str, dict[str, Any]],
        provenance: dict[str, Any],
        max_attempts: int = MAX_ATTEMPTS,
        stall_seconds: float = ExecutionConfig().stall_seconds,
    ) -> None:
        self.measure = measure
        self.definitions = definitions
        self.provenance = provenance
        self.max_attempts = max_attempts
        self.stall_seconds = stall_seconds

    @property
    def n_workers(self) -> int:
        """One at a time."""
        return 1

    def close(self) -> None:
        """There is nothing to let go of."""

    def run(
        self,
        store: Store,
        study_id: int,
        *,
        evaluation_ids: Sequence[int] | None = None,
        on_done: Callable[[ClaimedEvaluation, Evaluation], None],
        go_on: Callable[[], bool] = always,
    ) -> int:
        """Work until nothing is claimable; an interruption gives the evaluation in hand back.

        An evaluation that fails is tried `max_attempts` times in all, then set aside as failed; the rest goes on.
        """
        ledger = Ledger(store, study_id, evaluation_ids, definitions=self.definitions, max_attempts=self.max_attempts)
        n_done = 0
        while go_on() and (claimed := ledger.claim()) is not None:
            spec = claimed.spec
            try:
                pulse.beat()
                with Heartbeat(store, claimed, self.stall_seconds):
                    evaluation = self.measure(spec.method, np.array(spec.coalition_mask), opt_seed=spec.opt_seed)
                recorded = ledger.finish(claimed, evaluation, self.provenance)
            except StoreError:
                raise  # the store is gone, and with it the way to give the evaluation back
            except TributeError as error:
                ledger.fail(claimed, str(error))
                continue
            except BaseException:
                with suppress(StoreError):  # what happened first is said; the claim ends with this process
                    ledger.release(claimed)
                raise
            if recorded:
                n_done += 1
                on_done(claimed, evaluation)
        return n_done
