"""Small studies, their evaluations and how these are measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tribute.seeding import numpy_stream
from tribute.store.records import ClaimedEvaluation, EvaluationSpec, Store

N = 10


def open_study(store: Store, name: str = "main", dataset: str = "digits", n: int = N, **other: Any) -> int:
    given: dict[str, Any] = {
        "contributor_names": [f"vendor {i}" for i in range(n)],
        "n_examples": [10 + i for i in range(n)],
        "fingerprint": f"fingerprint-{n}",
    }
    return store.open_study(name, dataset=dataset, **{**given, **other})


def spec(removal_seed: int | None = 0, mask: Sequence[bool] | None = None, **other: Any) -> EvaluationSpec:
    if mask is None:
        mask = (numpy_stream(0, "test-mask", str(removal_seed)).random(N) < 0.5).tolist()
    given: dict[str, Any] = {
        "exp_name": "e1",
        "dataset": "digits",
        "method": "gd",
        "removal_dist": "shapley",
        "datamodel_alpha": None,
        "opt_seed": 0,
        "settings": {"gd_steps": 200, "model": "abc"},
    }
    return EvaluationSpec(removal_seed=removal_seed, coalition_mask=np.array(mask), **{**given, **other})


def claimed(store: Store, **other: Any) -> ClaimedEvaluation:
    found = store.claim(**other)
    if found is None:
        pytest.fail("there was something to claim")
    return found


def finish(store: Store, claim: ClaimedEvaluation, **behaviors: float) -> None:
    store.finish(claim, behaviors, seconds={"train": 2.0, "sample": 1.0}, provenance={"device": "cpu"})
