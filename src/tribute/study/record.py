"""What a study knows once its models are there: enough to read its results from the store without PyTorch.

`tribute run` writes `study.json` into the run folder; `tribute status`, `report` and `verify` begin with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tribute.config import StudyConfig
from tribute.errors import MixedResultsError, StoreError
from tribute.files import room_sentence, write_whole
from tribute.store.records import EvaluationSpec, Store

FILE_NAME = "study.json"


@dataclass(frozen=True)
class StudyRecord:
    """A study, its contributors, and the evaluations that it asks for.

    Attributes:
        name: Of the study.
        dataset: Name of the training data.
        contributor_names: `(n_contributors,)`.
        n_examples: `(n_contributors,)`, training examples that each contributor owns.
        fingerprint: Of the data and of who owns which example.
        behaviors: Names of those that are fitted and reported.
        evaluations: Identities of the planned evaluations, by role, in the order in which they are measured.
        models: Steps of the full and the sparse model; what pruning removed.
        classifier_accuracy: Held-out accuracy of the in-domain classifier; None where none is used.
        provenance: Versions, commit, device of the process that leads.
    """

    name: str
    dataset: str
    contributor_names: tuple[str, ...]
    n_examples: tuple[int, ...]
    fingerprint: str
    behaviors: tuple[str, ...]
    evaluations: Mapping[str, Sequence[str]] = field(repr=False)
    models: Mapping[str, Any]
    classifier_accuracy: float | None
    provenance: Mapping[str, Any]

    @property
    def n_contributors(self) -> int:
        return len(self.contributor_names)

    @property
    def n_evaluations(self) -> int:
        """Planned evaluations, of all roles."""
        return sum(len(identities) for identities in self.evaluations.values())

    def write(self, run_dir: Path) -> None:
        """Write it into the run folder; the file appears whole or not at all.

        Raises:
            StoreError: It cannot be written, as on a full disk.
        """
        try:
            write_whole(run_dir / FILE_NAME, json.dumps(asdict(self), indent=1))
        except OSError as error:
            raise StoreError(
                f"{run_dir / FILE_NAME} could not be written ({error}; {room_sentence(run_dir)}); models and "
                "evaluations are safe: make room and run the same command again"
            ) from error

    @classmethod
    def read(cls, config: StudyConfig) -> StudyRecord:
        """The record in the run folder of a study.

        Raises:
            StoreError: There is none, or it cannot be read.
        """
        return cls.read_from(config.run_dir)

    @classmethod
    def read_from(cls, run_dir: Path) -> StudyRecord:
        """The record in a run folder, which may have been moved; errors as of `read`."""
        path = run_dir / FILE_NAME
        try:
            values = json.loads(path.read_text())
            for name in ("contributor_names", "n_examples", "behaviors"):
                values[name] = tuple(values[name])
            return cls(**values)
        except FileNotFoundError as error:
            raise StoreError(
                f"{path} is not there: the models of the study are not trained yet, or outdir is another one. "
                "Expected the run folder of a study; run tribute run first"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{path} cannot be read as the record of a study ({error}); run tribute run again, which writes it anew"
            ) from error

    def study_id(self, store: Store) -> int:
        """The number of the study in its store.

        Raises:
            StoreError: It is not there.
            MixedResultsError: It is there with other data.
        """
        found = store.studies(name=self.name, dataset=self.dataset)
        if not found or found[0].study_id is None:
            raise StoreError(
                f"{store.location} has no study {self.name!r} on {self.dataset}; expected the store that tribute run "
                "wrote. Check db and outdir, or run tribute run again"
            )
        if found[0].fingerprint != self.fingerprint:
            raise MixedResultsError(
                f"{store.location} holds the study {self.name!r} with other data: stored {found[0].fingerprint[:12]}, "
                f"the run folder says {self.fingerprint[:12]}. Use the store and the run folder of one study"
            )
        return found[0].study_id

    def evaluation_ids(self, store: Store, *, roles: Sequence[str] | None = None) -> list[int]:
        """Numbers of the planned evaluations that the store has, of some roles or of all."""
        wanted = [
            identity
            for role, identities in self.evaluations.items()
            if roles is None or role in roles
            for identity in identities
        ]
        return list(store.ids_of(self.study_id(store), wanted).values())


def by_role(specs: Sequence[EvaluationSpec]) -> dict[str, list[str]]:
    """Identities of evaluations by role, in order."""
    found: dict[str, list[str]] = {}
    for spec in specs:
        found.setdefault(spec.role or "fit", []).append(spec.identity)
    return found
