"""Reports of studies that no network measured, each made once."""

from __future__ import annotations

import pytest
from written_report import HOSTILE_NAMES, Written, make_report

from benchmarks.synthetic_study import two_behaviors, write_synthetic_study
from tribute.report.page import PayoutRequest


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Twelve contributors, two behaviors, all finished, with a budget."""
    folder = tmp_path_factory.mktemp("plain")
    study = write_synthetic_study(folder, two_behaviors(12), n_fit=48, n_test=16)
    return make_report(study, payout=PayoutRequest("10000", "EUR", "zero"))


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Contributors whose names attack the page, in a study half done."""
    folder = tmp_path_factory.mktemp("hostile")
    behaviors = two_behaviors(len(HOSTILE_NAMES))
    study = write_synthetic_study(
        folder, behaviors, contributor_names=HOSTILE_NAMES, n_fit=60, n_test=20, n_finished=76, n_failed=2
    )
    return make_report(study, payout=PayoutRequest("100.01", "USD", "signed"))


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Three hundred contributors with long names."""
    n = 300
    names = [f"The estate of contributor number {i}, photographs and drawings, all rights reserved" for i in range(n)]
    folder = tmp_path_factory.mktemp("large")
    study = write_synthetic_study(folder, two_behaviors(n), contributor_names=names, n_fit=120, n_test=12)
    return make_report(study, payout=PayoutRequest("10000", "EUR", "pool"))


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Every kind of part, and not much of it, for what takes long on a large page."""
    names = HOSTILE_NAMES[:1] + HOSTILE_NAMES[4:8] + ("nobody in particular",)
    study = write_synthetic_study(
        tmp_path_factory.mktemp("small"),
        two_behaviors(6)[:1],
        contributor_names=names,
        n_fit=24,
        n_finished=48,
        n_test=12,
    )
    return make_report(study, payout=PayoutRequest("100"))
