"""A study that is killed anywhere, and run again, ends as if it had not been."""

from __future__ import annotations

from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from benchmarks.faults import (
    N_EVALUATIONS,
    STAGES,
    Moment,
    Place,
    draw_moments,
    kill_and_continue,
    read_counts,
    read_log,
    read_outcome,
    run_in_child,
)


@pytest.fixture(scope="module")
def undisturbed(process_server: ForkServerContext, tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("undisturbed"), with_classifier=True).prepare()
    assert run_in_child(process_server, place) == 0
    return place


def test_an_undisturbed_study_has_events_in_every_stage_and_measures_once(undisturbed: Place) -> None:
    counts = read_counts(undisturbed)
    assert all(counts[stage] >= 5 for stage in STAGES)
    assert len(read_log(undisturbed, "measure")) == len(set(read_log(undisturbed, "measure"))) == N_EVALUATIONS
    outcome = read_outcome(undisturbed)
    assert {status for status, _ in outcome.evaluations.values()} == {"finished"}
    assert len(outcome.evaluations) == N_EVALUATIONS


def test_a_study_killed_20_times_across_all_stages_ends_as_if_it_had_not_been(
    process_server: ForkServerContext, undisturbed: Place, tmp_path: Path
) -> None:
    moments = draw_moments(read_counts(undisturbed), seed=0, in_a_row=True)
    assert len(moments) == 20 and {moment.stage for moment in moments} == set(STAGES)
    harm = kill_and_continue(process_server, Place(tmp_path, with_classifier=True).prepare(), moments, undisturbed)
    assert harm.differing == []
    assert harm.n_in_flight >= 5


def test_a_study_killed_while_the_pruned_model_is_written_prunes_again(
    process_server: ForkServerContext, undisturbed: Place, tmp_path: Path
) -> None:
    place = Place(tmp_path, with_classifier=True).prepare()
    assert kill_and_continue(process_server, place, [Moment("Pruning", 8)], undisturbed).differing == []
