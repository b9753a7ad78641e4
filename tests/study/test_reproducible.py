"""Two runs of one study on one machine agree to the last bit, whatever their folder, name and way of computing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits
from tiny_study import SilentListener

from tribute.config import StudyConfig
from tribute.store.records import Store
from tribute.study.manifest import Manifest, describe_attributions, describe_lds, read_manifest
from tribute.study.record import StudyRecord
from tribute.study.results import StudyResult, read_result
from tribute.study.run import run_study

SMALL: dict[str, Any] = {
    "fit": {"n_coalitions": 16, "n_end_points": 2},
    "test": {"n_coalitions": 3, "opt_seeds": [1, 2]},
}


def attested(config: StudyConfig) -> tuple[StudyResult, Manifest]:
    result = run_study(config, SilentListener())
    manifest = read_manifest(config.run_dir)
    assert result is not None
    assert manifest is not None
    return result, manifest


def test_two_runs_agree_to_the_last_bit_and_other_seeds_do_not(
    make_study: Callable[..., StudyConfig], tmp_path: Path
) -> None:
    config = make_study(**SMALL)
    first, manifest = attested(config)
    with Store.open(config.db_url, create=False) as store:
        for n_threads in (1, 2, 4):
            with threadpool_limits(n_threads, user_api="blas"):
                fitted = read_result(config, StudyRecord.read(config), store)
            assert describe_attributions(fitted) == manifest.values["attributions"]
    again, second = attested(make_study(outdir=str(tmp_path / "another place"), **SMALL))
    for a, b in zip(first.behaviors, again.behaviors, strict=True):
        for kernel, fitted in a.attributions.items():
            np.testing.assert_array_equal(fitted.values, b.attributions[kernel].values)
            np.testing.assert_array_equal(fitted.covariance, b.attributions[kernel].covariance)
        for kernel, found in a.validations.items():
            assert found.score.mean == b.validations[kernel].score.mean
    assert describe_lds(first) == describe_lds(again)
    assert manifest.values["store"] == second.values["store"]
    assert manifest.values["result"] == second.values["result"]
    assert manifest.result_hash == second.result_hash
    assert manifest.hash != second.hash, "the settings in config.yaml name the folder"
    _, renamed = attested(
        make_study(
            name="under-another-name",
            sampling={"batch_size": 5},
            execution={"stall_seconds": 99.0},
            ckpt_freq=2,
            **SMALL,
        )
    )
    assert renamed.values["result"] == manifest.values["result"]
    assert renamed.values["store"] != manifest.values["store"], "the name is in the identities"
    _, other = attested(make_study(name="other-seed", opt_seed=7, **SMALL))
    parts = {name for name in other.values["result"] if other.values["result"][name] != manifest.values["result"][name]}
    assert parts == {"settings", "models", "behaviors", "attributions", "lds"}


def test_a_study_that_grew_agrees_with_one_made_at_once(make_study: Callable[..., StudyConfig], tmp_path: Path) -> None:
    """The order of rows in the store is another one."""
    test: dict[str, Any] = {"test": {"n_coalitions": 0}}
    _, at_once = attested(make_study(fit={"n_coalitions": 14, "n_end_points": 2}, **test))
    place = {"outdir": str(tmp_path / "grown")}
    attested(make_study(fit={"n_coalitions": 12, "n_end_points": 1}, **place, **test))
    _, grown = attested(make_study(fit={"n_coalitions": 14, "n_end_points": 2}, **place, **test))
    assert grown.values["result"] == at_once.values["result"]
    assert grown.values["store"] == at_once.values["store"]
