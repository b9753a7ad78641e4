"""What a pilot says: every verdict can be reached, the figures are those of an oracle, the file reads back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from tribute.errors import StoreError
from tribute.study.pilot_record import (
    FILE_NAME,
    PilotBehavior,
    PilotResult,
    correlation_interval,
    judge,
    pilot_warning,
    read_pilot,
    spearman,
)

RISING = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
NEARLY = [1.0, 2.0, 4.0, 3.0, 5.0, 6.0, 8.0, 7.0]  # correlation 0.95
WEAKLY = [3.0, 1.0, 5.0, 2.0, 8.0, 4.0, 6.0, 7.0]  # 0.69: may be chance
SHUFFLED = [5.0, 8.0, 2.0, 6.0, 1.0, 4.0, 7.0, 3.0]


def judged(sft: list[float], **changes: Any) -> PilotBehavior:
    """Quiet, and with a good sparse model, unless `changes` say otherwise."""
    given: dict[str, Any] = {
        "higher_is_better": True,
        "full": 10.0,
        "sparse": 9.0,
        "sft_pair": (1.0, 1.1),
        "retrain_pair": (1.0, 1.1),
    }
    return judge("fid", sft, RISING, **(given | changes))


@pytest.mark.parametrize(
    ("found", "verdict", "figure"),
    [
        (judged(NEARLY), "go", "rank correlation 0.95"),
        (judged(WEAKLY), "more_coalitions", "--n_coalitions 16"),
        (judged(SHUFFLED), "more_steps", "gd.n_steps"),
        (judged(SHUFFLED, sft_pair=(1.0, 6.0)), "more_images", "by sparsified fine-tuning, training seeds alone"),
        (judged(SHUFFLED, retrain_pair=(1.0, 6.0)), "more_images", "by retraining, training seeds alone"),
        (judged(SHUFFLED, sparse=20.0), "less_pruning", "+10 from the full one"),
        (judged(SHUFFLED, sparse=0.0), "less_pruning", "-10 from the full one"),
    ],
    ids=lambda value: value.verdict if isinstance(value, PilotBehavior) else None,
)
def test_every_verdict_can_be_reached_and_shows_its_figure(found: PilotBehavior, verdict: str, figure: str) -> None:
    assert found.verdict == verdict
    assert found.passed == (verdict == "go")
    assert any(figure in sentence for sentence in found.sentences), found.sentences


def test_all_that_is_wrong_is_said() -> None:
    found = judged(SHUFFLED, sparse=20.0, retrain_pair=(1.0, 6.0))
    assert found.verdict == "more_images"
    assert len(found.sentences) == 2 and "less pruning" in found.sentences[1]


def test_ranks_that_agree_outweigh_noise_and_a_poor_sparse_model_is_named_beside_a_go() -> None:
    found = judged(NEARLY, sparse=20.0, retrain_pair=(1.0, 6.0))
    assert found.verdict == "go"
    assert "credit adds up to the behavior of the sparse model" in found.sentences[1]


def test_a_behavior_that_compares_with_the_full_model_is_not_asked_about_pruning() -> None:
    assert judged(SHUFFLED, full=None, sparse=None).verdict == "more_steps"


@pytest.mark.parametrize("constant", ["sft", "retrain"])
def test_what_does_not_vary_is_no_go(constant: str) -> None:
    values = {"sft": RISING, "retrain": RISING} | {constant: [2.0] * 8}
    found = judge(
        "fid",
        values["sft"],
        values["retrain"],
        higher_is_better=True,
        full=1.0,
        sparse=1.0,
        sft_pair=(1.0, 1.0),
        retrain_pair=(1.0, 1.0),
    )
    assert math.isnan(found.correlation) and found.interval == (-1.0, 1.0)
    assert found.verdict == ("more_steps" if constant == "sft" else "more_images")


def test_what_does_not_vary_is_said_in_words() -> None:
    nothing = judge(
        "fid",
        RISING,
        [2.0] * 8,
        higher_is_better=True,
        full=1.0,
        sparse=1.0,
        sft_pair=(1.0, 1.1),
        retrain_pair=(2.0, 2.0),
    )
    (sentence,) = nothing.sentences
    assert "by retraining" in sentence and "nan" not in sentence, "fine-tuning has little noise, and is not blamed"
    short = judged([2.0] * 8)
    assert short.verdict == "more_steps" and "nan" not in short.sentences[0]


def test_the_correlation_is_that_of_scipy_and_so_are_the_spreads() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        first, second = rng.integers(0, 6, 9).astype(float), rng.normal(size=9)
        assert spearman(list(first), list(second)) == pytest.approx(spearmanr(first, second)[0])
    found = judged(SHUFFLED, sft_pair=(1.0, 3.0))
    assert found.sft_noise == pytest.approx(np.std([1.0, 3.0], ddof=1))
    assert found.retrain_spread == pytest.approx(np.std(RISING, ddof=1))
    assert found.level_difference == pytest.approx(np.mean(SHUFFLED) - np.mean(RISING))


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Of 8 pairs without a correlation, 95 in 100 intervals include 0; they are wide, and that of 3 says nothing."""
    rng = np.random.default_rng(1)
    held = [
        low <= 0 <= high
        for low, high in (correlation_interval(spearman(*rng.normal(size=(2, 8)).tolist()), 8) for _ in range(2000))
    ]
    assert 0.93 < np.mean(held) < 0.98
    low, high = correlation_interval(0.5, 8)
    assert high - low > 1.0
    assert correlation_interval(1.0, 3) == (-1.0, 1.0)


def result(*behaviors: PilotBehavior) -> PilotResult:
    return PilotResult("tiny", ("0011",) * 8, behaviors, {"gd": 1.5, "retrain": 20.0})


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    nan = judge(
        "fid",
        [1.0, 1.0, 1.0],
        [1.0, 2.0, 3.0],
        higher_is_better=False,
        full=None,
        sparse=None,
        sft_pair=(1.0, 1.0),
        retrain_pair=(1.0, 2.0),
    )
    written = result(judged(NEARLY), nan)
    written.write(tmp_path)
    found = read_pilot(tmp_path)
    assert found is not None
    assert found.behaviors[0] == written.behaviors[0]
    assert math.isnan(found.behaviors[1].correlation)
    assert not found.passed and result(judged(NEARLY)).passed
    assert json.loads((tmp_path / FILE_NAME).read_text())["passed"] is False


def test_no_pilot_is_none_and_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    assert read_pilot(tmp_path) is None
    (tmp_path / FILE_NAME).write_text('{"format_version": 1, "passed": tr')
    with pytest.raises(StoreError, match="run tribute pilot again"):
        read_pilot(tmp_path)
    (tmp_path / FILE_NAME).write_text('{"format_version": 99}')
    with pytest.raises(StoreError, match="upgrade"):
        read_pilot(tmp_path)


def test_run_warns_unless_a_pilot_passed(tmp_path: Path) -> None:
    assert "no pilot" in (pilot_warning(tmp_path) or "")
    result(judged(NEARLY), judged(SHUFFLED)).write(tmp_path)
    assert "fid: more fine-tuning steps" in (pilot_warning(tmp_path) or "")
    result(judged(NEARLY)).write(tmp_path)
    assert pilot_warning(tmp_path) is None
    (tmp_path / FILE_NAME).write_text("{")
    assert "cannot be read" in (pilot_warning(tmp_path) or "")
