"""`tribute plan` on a real study: what is done is subtracted, nothing is written, bad settings are found first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tiny_study import SilentListener

from tribute.cli import main
from tribute.config import StudyConfig
from tribute.errors import BehaviorError, ConfigError, FitError
from tribute.study import planning, unit_costs
from tribute.study.plan import StudyPlan
from tribute.study.planning import make_plan
from tribute.study.run import run_study

MakeStudy = Callable[..., StudyConfig]

SMALL = {
    "fit": {"n_coalitions": 10, "n_end_points": 1, "first_removal_seed": 300},
    "test": {"n_coalitions": 3, "opt_seeds": [1, 2]},
}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_costs, "SECONDS_PER_MEASUREMENT", 0.02)


def left(plan: StudyPlan) -> dict[str, tuple[int, bool]]:
    return {stage.name: (stage.n_left, stage.seconds_left > 0) for stage in plan.stages}


def contents(folder: Path) -> set[tuple[str, bytes]]:
    """Of all files but the two helpers that SQLite may leave beside a store that was read."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(("-wal", "-shm")))
    return {(str(path), path.read_bytes()) for path in files}


def test_a_plan_writes_nothing_and_subtracts_what_is_done(make_study: MakeStudy) -> None:
    config = make_study(**SMALL)
    before = make_plan(config)
    assert not config.outdir.exists()
    names = ["full_model", "pruning", "sparse_model", "end_points", "fit", "test"]
    assert [stage.name for stage in before.stages] == names
    assert left(before) == dict.fromkeys(names[:3], (0, True)) | {
        "end_points": (2, True),
        "fit": (10, True),
        "test": (6, True),
    }
    assert before.device_hours(left=True) == before.device_hours()
    assert all(stage.seconds > 0 for stage in before.stages)
    steps = {stage.name: stage.n_steps for stage in before.stages}
    assert steps == {"full_model": 6, "pruning": 0, "sparse_model": 4, "end_points": 3, "fit": 30, "test": 36}
    with pytest.raises(KeyboardInterrupt):
        run_study(config, SilentListener(interrupt_after=7))
    written = contents(config.run_dir)
    begun = make_plan(config)
    assert contents(config.run_dir) == written
    assert left(begun) == dict.fromkeys(names[:3], (0, False)) | {
        "end_points": (0, False),
        "fit": (5, True),
        "test": (6, True),
    }
    assert 0 < begun.device_hours(left=True) < begun.device_hours()
    larger = make_plan(make_study(fit=SMALL["fit"] | {"n_coalitions": 16}, test={"n_coalitions": 0}))
    assert left(larger)["fit"] == (11, True)


def test_the_sparse_network_is_the_pruned_one_and_checkpoints_have_the_size_that_was_foreseen(
    make_study: MakeStudy,
) -> None:
    config = make_study(**SMALL)
    plan = make_plan(config)
    result = run_study(config, SilentListener())
    assert result is not None
    counts = result.models["sparse"]["n_parameters"]
    assert dict(plan.units.n_parameters) == {"full": counts["before"], "sparse": counts["after"]}
    for stage, method in (("full_model", "retrain"), ("sparse_model", "prune_fine_tune"), ("pruning", "pruned")):
        folder = config.run_dir / "digits" / method
        found = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        expected = next(item.bytes for item in plan.stages if item.name == stage)
        # In so small a network the names of tensors weigh as much as some of the numbers.
        assert expected <= found < 2 * expected, stage


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"behaviors": ["brightnes"]}, ConfigError, "brightnes"),
        ({"fit": {"n_coalitions": 5000}}, FitError, "ask for fewer"),
        ({"sampling": {"n_samples": 1}, "behaviors": ["fid"]}, BehaviorError, "at least"),
        ({"mixed_precision": "fp16"}, ConfigError, "fp16"),
    ],
)
def test_bad_settings_are_found_before_anything_is_measured(
    make_study: MakeStudy,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr(planning, "measure_unit_costs", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(error, match=message):
        make_plan(make_study(**changes))


def test_a_classifier_that_is_not_there_is_estimated_and_not_left_behind(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRIBUTE_CACHE", str(tmp_path / "cache"))
    plan = make_plan(make_study(behaviors=["fid"], sampling={"n_samples": 40}, **SMALL))
    assert plan.units.seconds_classifier > 0
    assert any("classifier" in note for note in plan.units.notes)
    assert not (tmp_path / "cache" / "classifiers").exists()
    assert not (tmp_path / "cache" / "references").exists()


def test_local_behaviors_are_in_the_plan(make_study: MakeStudy) -> None:
    with_local = make_plan(make_study(behaviors=["local"], local={"n_samples": 8, "n_noises": 2}, **SMALL))
    assert with_local.units.seconds_measure["gd"] > 0
    assert any("local" in note for note in with_local.units.notes)


def test_the_command_prints_stages_and_writes_json(
    make_study: MakeStudy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_study(**SMALL, max_device_hours=3)
    path, target = tmp_path / "study.yaml", tmp_path / "plan.json"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    main("plan", [str(path), "--workers", "1", "4", "--json_file", str(target)])
    shown = capsys.readouterr().out
    for text in ("full model", "sparse model", "end points", "fit", "test", "in all", "workers", "max_device_hours 3"):
        assert text in shown
    content = json.loads(target.read_text())
    assert set(content["wall_seconds"]) == {"1", "4"}
    assert content["wall_seconds"]["4"]["in_all"] > 0
    with pytest.raises(SystemExit) as ended:
        main("plan", [str(path), "--workers", "0"])
    assert ended.value.code == 1
    assert "--workers" in capsys.readouterr().err
