"""Whether the end points of a study can be had: without them, hours of other coalitions are worth nothing."""

from __future__ import annotations

from collections.abc import Sequence

from tribute.store.records import Store

TITLES = {"empty": "the empty coalition", "grand": "the grand coalition"}


class EndPointsWatch:
    """Looks at v(empty) and v(grand) while a study is measured, until each is there once.

    Args:
        store: Holds the evaluations.
        study_id: Their study.
        evaluation_ids: The planned ones.
    """

    def __init__(self, store: Store, study_id: int, evaluation_ids: Sequence[int]) -> None:
        self.store = store
        self.study_id = study_id
        self.evaluation_ids = list(evaluation_ids)
        self._missing = list(TITLES)

    def can_be_had(self) -> bool:
        """False where every evaluation of an end point has failed; what is in hand or to be tried again may succeed."""
        for role in list(self._missing):
            counts = self.store.counts(self.study_id, role=role, evaluation_ids=self.evaluation_ids)
            if counts["finished"]:
                self._missing.remove(role)
            elif counts["failed"] and not counts["pending"] + counts["running"]:
                return False
        return True


def failure_of(store: Store, study_id: int, role: str, evaluation_ids: Sequence[int]) -> str:
    """Why an end point is not there, for the message of an error."""
    failed = store.find(study_id, role=role, statuses=("failed",), evaluation_ids=evaluation_ids)
    return (
        f"{TITLES[role]} could not be measured, and nothing can be fitted without it: {len(failed)} of "
        f"{len(failed)} evaluations failed, {failed[0].attempts} attempts each. The reason: {failed[0].error} "
        "Remove it and run the same command again; what is measured stays"
    )
