"""A loss or a behavior that is not finite: the coalition is set aside with the reason, and the rest goes on."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tribute.config import NoiseScheduleConfig, StudyConfig, TrainConfig, UNetConfig
from tribute.diffusion.train import CheckpointPolicy, Progress, Trainer
from tribute.errors import FitError, TributeError
from tribute.models.build import build_unet
from tribute.models.checkpoint import list_checkpoints
from tribute.store.records import EvaluationSpec, Store, StoredEvaluation
from tribute.study.outputs import summary, write_outputs
from tribute.study.run import run_study
from tribute.study.session import StudySession
from tribute.types import Images

MakeStudy = Callable[..., StudyConfig]


class Listener:
    def __init__(self) -> None:
        self.messages: list[str] = []

    def stage(self, title: str) -> None: ...
    def message(self, text: str) -> None:
        self.messages.append(text)

    def progress(self, title: str, n_done: int, n_total: int, text: str) -> None: ...


def stored(config: StudyConfig) -> list[StoredEvaluation]:
    with Store.open(config.db_url, create=False) as store:
        return store.find()


def diverge(monkeypatch: pytest.MonkeyPatch, is_hit: Callable[[npt.NDArray[np.int64]], bool]) -> list[int]:
    """Let the loss of trainings on some examples become infinite at their second step."""
    loss = Trainer._loss
    hits: list[int] = []

    def diverging(self: Trainer, model: Any, example_idx: Any, config: TrainConfig, batch_number: int) -> torch.Tensor:
        found = loss(self, model, example_idx, config, batch_number)
        if batch_number == 1 and is_hit(example_idx):
            hits.append(len(example_idx))
            return found * torch.inf
        return found

    monkeypatch.setattr(Trainer, "_loss", diverging)
    return hits


def spoil(monkeypatch: pytest.MonkeyPatch, is_hit: Callable[[str, npt.NDArray[np.bool_]], bool]) -> None:
    """Let a behavior of some coalitions be NaN."""
    measure = StudySession.measure

    def spoiling(self: StudySession, method: str, coalition_mask: Any, *, opt_seed: int) -> Any:
        evaluation = measure(self, method, coalition_mask, opt_seed=opt_seed)
        if is_hit(method, coalition_mask):
            evaluation.behaviors["fault_behaviors:brightness"] = float("nan")
        return evaluation

    monkeypatch.setattr(StudySession, "measure", spoiling)


def fit_specs(config: StudyConfig) -> list[EvaluationSpec]:
    return [item.spec for item in stored(config) if item.spec.role == "fit"]


@pytest.mark.parametrize("log_freq", [1, 100])
def test_a_training_that_diverges_stops_and_saves_nothing_of_it(
    unet_config: UNetConfig,
    noise_schedule: NoiseScheduleConfig,
    digit_images: Images,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    log_freq: int,
) -> None:
    trainer = Trainer(digit_images[:16], noise_schedule, device="cpu")
    diverge(monkeypatch, lambda _: True)
    seen: list[Progress] = []
    policy = CheckpointPolicy(tmp_path, {"unet": unet_config.model_dump(mode="json")}, ckpt_freq=1)
    with pytest.raises(TributeError, match=r"diverged before step 2: the loss is .*Lower the learning rate"):
        trainer.train(
            build_unet(unet_config, opt_seed=1),
            np.arange(16),
            TrainConfig(n_steps=6, batch_size=8),
            checkpoints=policy,
            on_log=seen.append,
            log_freq=log_freq,
        )
    assert [path.name for path in list_checkpoints(tmp_path)] == ["ckpt_steps_00000001"]


def test_coalitions_that_fail_are_set_aside_and_the_rest_goes_on(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In one coalition the loss is not finite, in another one a behavior."""
    config = make_study(fit={"n_coalitions": 24, "n_end_points": 1, "first_removal_seed": 300})
    whole = run_study(make_study(name="whole", fit=config.fit.model_dump()), Listener())
    assert whole is not None
    diverging, spoiled = (fit_specs(make_study(name="whole"))[i].coalition_mask for i in (4, 9))
    with monkeypatch.context() as patch:
        rows = np.flatnonzero(diverging[run_owners()])
        n_diverged = diverge(patch, lambda example_idx: np.array_equal(example_idx, rows))
        n_spoiled: list[Any] = []
        spoil(patch, lambda _, mask: bool(np.array_equal(mask, spoiled)) and not n_spoiled.append(1))
        listener = Listener()
        with caplog.at_level(logging.WARNING):
            result = run_study(config, listener)
    assert result is not None and len(n_diverged) == len(n_spoiled) == 3
    failed = [item for item in stored(config) if item.status == "failed"]
    assert [item.attempts for item in failed] == [3, 3]
    reasons = ("training diverged", "'fault_behaviors:brightness'.*must be a finite number")
    for item, mask, reason in zip(failed, (diverging, spoiled), reasons, strict=True):
        np.testing.assert_array_equal(item.spec.coalition_mask, mask)
        assert item.error is not None
        assert re.search(reason, item.error)
    assert [item.status for item in stored(config)].count("finished") == 24
    assert any("2 evaluations failed and are set aside" in text for text in listener.messages)
    fitted = result.behaviors[0].attributions["shapley"]
    assert np.isfinite(fitted.values).all() and fitted.n_coalitions == 22
    assert result.set_aside == {"fit": 2}
    assert summary(result)["evaluations"]["fit"]["failed"] == 2
    write_outputs(result)
    again = run_study(config, Listener())  # they are tried again when the study is run again
    assert again is not None and again.set_aside == {}
    assert again.behaviors[0].attributions["shapley"].n_coalitions == 24
    np.testing.assert_array_equal(
        again.behaviors[0].attributions["shapley"].values, whole.behaviors[0].attributions["shapley"].values
    )


def run_owners() -> npt.NDArray[np.int32]:
    """Owner of each training example of the digits."""
    from tribute.data.sources import load_training_data

    return np.asarray(load_training_data("digits").contributors.contributor_of_example)


def test_a_test_coalition_that_fails_under_one_seed_leaves_the_others(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_study(test={"n_coalitions": 6, "opt_seeds": [1, 2]})
    retrained: list[int] = []

    def is_hit(method: str, mask: npt.NDArray[np.bool_]) -> bool:
        retrained.append(method == "retrain")
        return method == "retrain" and sum(retrained) in (2, 3, 4)

    spoil(monkeypatch, is_hit)
    result = run_study(config, Listener())
    assert result is not None and result.set_aside == {"test": 1}
    assert result.behaviors[0].test_masks is not None
    assert result.behaviors[0].test_behaviors.shape == (2, 5)
    assert result.behaviors[0].validations["shapley"].score.n_test == 5


def test_an_end_point_that_fails_is_named_with_the_reason_before_hours_are_spent(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_measured: list[str] = []

    def is_hit(method: str, mask: npt.NDArray[np.bool_]) -> bool:
        n_measured.append(method)
        return not mask.any()

    spoil(monkeypatch, is_hit)
    config = make_study()
    with pytest.raises(FitError, match=r"empty coalition.*could not be measured.*finite number.*run the same command"):
        run_study(config, Listener())
    assert len(n_measured) <= 3 + 1
    statuses = [item.status for item in stored(config)]
    assert statuses.count("failed") == 1 and "running" not in statuses


def test_a_full_model_that_diverges_stops_the_study(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    diverge(monkeypatch, lambda example_idx: True)
    config = make_study()
    with pytest.raises(TributeError, match=r"training diverged before step 2.*Lower the learning rate"):
        run_study(config, Listener())
    assert not (config.run_dir / "results.db").exists()
