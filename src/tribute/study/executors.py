"""Working through the pending evaluations of a store."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tribute.errors import StoreError, TributeError
from tribute.store.records import ClaimedEvaluation, Store
from tribute.study.value_function import Evaluation

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3


class Executor(Protocol):
    """Measures evaluations until none is left."""

    def run(self, store: Store, study_id: int, *, on_done: Callable[[ClaimedEvaluation, Evaluation], None]) -> int:
        """Work through the study; returns the number of evaluations finished here."""
        ...


class SerialExecutor:
    """One warm process that claims, measures and records one evaluation after another.

    Args:
        evaluate: The value function of a claimed evaluation.
        definitions: Unit, direction and variant of the behaviors, stored with every value.
        provenance: Stored with every evaluation.
        roles: Only evaluations with these roles; None takes all.
        evaluation_ids: Only these evaluations; None takes all.
        max_attempts: How often an evaluation that fails is tried in all.
    """

    def __init__(
        self,
        evaluate: Callable[[ClaimedEvaluation], Evaluation],
        *,
        definitions: dict[str, dict[str, Any]],
        provenance: dict[str, Any],
        roles: Sequence[str] | None = None,
        evaluation_ids: Sequence[int] | None = None,
        max_attempts: int = MAX_ATTEMPTS,
    ) -> None:
        self.evaluate = evaluate
        self.definitions = definitions
        self.provenance = provenance
        self.max_attempts = max_attempts
        self.filters: dict[str, Any] = {"roles": roles, "evaluation_ids": evaluation_ids}

    def run(self, store: Store, study_id: int, *, on_done: Callable[[ClaimedEvaluation, Evaluation], None]) -> int:
        """Work until nothing is claimable; an interruption gives the evaluation in hand back.

        An evaluation that fails is tried `max_attempts` times in all, then set aside as failed; the rest goes on.
        """
        n_done = 0
        while (claimed := store.claim(study_id, **self.filters)) is not None:
            try:
                evaluation = self.evaluate(claimed)
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
