"""Working through the pending evaluations of a store."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from tribute.errors import StoreError, TributeError
from tribute.store.records import ClaimedEvaluation, Store
from tribute.study.value_function import Evaluation
from tribute.types import CoalitionMask

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3


class Measure(Protocol):
    """v(S) from the method, the coalition `(n_contributors,)` and the training seed."""

    def __call__(self, method: str, coalition_mask: CoalitionMask, *, opt_seed: int) -> Evaluation: ...


def always() -> bool:
    """Nothing limits the work."""
    return True


class Executor(Protocol):
    """Measures evaluations until none is left; set up once, it serves every call of `run`."""

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


class SerialExecutor:
    """One warm process that claims, measures and records one evaluation after another.

    Args:
        measure: v(S) from the method, the coalition and `opt_seed`.
        definitions: Unit, direction and variant of the behaviors, stored with every value.
        provenance: Stored with every evaluation.
        max_attempts: How often an evaluation that fails is tried in all.
    """

    def __init__(
        self,
        measure: Measure,
        *,
        definitions: dict[str, dict[str, Any]],
        provenance: dict[str, Any],
        max_attempts: int = MAX_ATTEMPTS,
    ) -> None:
        self.measure = measure
        self.definitions = definitions
        self.provenance = provenance
        self.max_attempts = max_attempts

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
        n_done = 0
        while go_on() and (claimed := store.claim(study_id, evaluation_ids=evaluation_ids)) is not None:
            spec = claimed.spec
            try:
                evaluation = self.measure(spec.method, np.array(spec.coalition_mask), opt_seed=spec.opt_seed)
                store.finish(
                    claimed,
                    evaluation.behaviors,
                    seconds=evaluation.seconds,
                    provenance={**self.provenance, "n_steps": evaluation.n_steps},
                    definitions=self.definitions,
                )
            except StoreError:  # the store is gone, or another process has the evaluation now
                if store.heartbeat(claimed):
                    raise
                logger.warning("Evaluation %s was measured by another process, too; going on", claimed.spec)
                continue
            except TributeError as error:
                store.fail(claimed, str(error))
                logger.warning("Evaluation %s failed: %s", claimed.spec, error)
                store.retry(study_id, max_attempts=self.max_attempts, evaluation_ids=[claimed.evaluation_id])
                continue
            except BaseException:
                store.release(claimed)
                raise
            n_done += 1
            on_done(claimed, evaluation)
        return n_done
