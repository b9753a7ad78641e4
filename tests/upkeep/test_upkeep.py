"""What retry, reset and gc take, what they leave, and that they ask."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from paper_study import PaperStudy, files_below, write_checkpoint, write_study

from tribute.cli import main
from tribute.cli.arguments import read_study
from tribute.cli.console import confirm
from tribute.errors import ConfigError, StoreError
from tribute.store.records import Store
from tribute.study import upkeep
from tribute.study.run_folder import RunLock
from tribute.study.status import model_folders
from tribute.study.upkeep import (
    STAGES,
    apply_reset,
    clean,
    find_cache_waste,
    find_waste,
    is_whole,
    only,
    plan_reset,
    remove,
    size_of,
)

WHOLE = {
    "empty": {"finished": 2},
    "grand": {"finished": 2},
    "fit": {"finished": 20},
    "test": {"finished": 8},
}


@pytest.fixture
def study(tmp_path: Path) -> PaperStudy:
    """A study that is complete."""
    study = write_study(tmp_path)
    with study.store() as store:
        study.finish(store)
    (study.config.run_dir / "summary.json").write_text("{}")
    return study


def age(path: Path, seconds: float = 7200.0) -> Path:
    """Let a file or folder look as if nobody had touched it for so long."""
    then = time.time() - seconds
    for item in (path, *(path.rglob("*") if path.is_dir() else ())):
        os.utime(item, (then, then), follow_symlinks=False)
    return path


def failing(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(argv[0], list(argv[1:]))
    assert caught.value.code == 1
    return capsys.readouterr().err


# retry


def test_retry_makes_failed_ones_claimable_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = write_study(tmp_path)
    with study.store() as store:
        for role, reason in (("grand", "out of memory"), ("fit", "not finite")):
            claimed = store.claim(study.study_id(store), role=role)
            assert claimed is not None
            store.fail(claimed, reason)
    main("retry", [str(study.path), "--role", "fit"])
    out = capsys.readouterr().out
    assert "not finite" in out and "out of memory" not in out and "1 evaluations are pending again" in out
    assert study.by_status()["grand"] == {"failed": 1, "pending": 1}
    main("retry", [str(study.path)])
    assert "out of memory" in capsys.readouterr().out
    main("retry", [str(study.path)])
    assert "no evaluation has failed" in capsys.readouterr().out
    with study.store() as store:
        assert study.finish(store) == len(study.specs)


# reset


@pytest.mark.parametrize("stage", ["full_model", "pruned_model", "sparse_model"])
def test_a_model_takes_along_what_was_made_from_it_and_no_more(study: PaperStudy, stage: str) -> None:
    main("reset", [str(study.path), "--stage", stage, "--yes"])
    assert study.by_status() == {"test": {"finished": 8}}, "retrained models begin with random weights"
    there = [name for name, folder in model_folders(study.config).items() if folder.exists()]
    assert there == ["full", "pruned", "sparse"][: ["full_model", "pruned_model", "sparse_model"].index(stage)]
    assert not (study.config.run_dir / "study.json").exists()
    assert not (study.config.run_dir / "summary.json").exists()
    assert (study.config.run_dir / "config.yaml").exists()
    with study.store() as store:
        assert not plan_reset(study.config, stage, store), "again, it finds nothing"


def test_local_behaviors_compare_with_the_full_model_and_so_go_with_it(tmp_path: Path) -> None:
    study = write_study(tmp_path, local=True)
    with study.store() as store:
        study.finish(store)
        assert {item.spec.role for item in plan_reset(study.config, "sparse_model", store).deleted} == set(WHOLE) - {
            "test"
        }
        found = plan_reset(study.config, "full_model", store)
        assert {item.spec.role for item in found.deleted} == set(WHOLE)


def test_other_studies_in_the_store_stay(tmp_path: Path) -> None:
    first = write_study(tmp_path)
    (tmp_path / "b").mkdir()
    second = write_study(tmp_path / "b", name="other", db=first.config.db_url)
    with first.store() as store:
        first.finish(store)
        second.finish(store)
    main("reset", [str(first.path), "--stage", "full_model", "--yes"])
    main("reset", [str(first.path), "--stage", "sparse_model", "--yes"])
    assert second.by_status() == WHOLE


def test_a_role_becomes_pending_and_is_measured_again(study: PaperStudy) -> None:
    main("reset", [str(study.path), "--stage", "fit", "--yes"])
    assert study.by_status() == {**WHOLE, "fit": {"pending": 20}}
    main("reset", [str(study.path), "--stage", "coalitions", "--yes"])
    assert study.by_status() == {role: {"pending": sum(n.values())} for role, n in WHOLE.items()}
    assert all(folder.exists() for folder in model_folders(study.config).values())
    with study.store() as store:
        assert study.finish(store) == len(study.specs)
    assert study.by_status() == WHOLE


def test_reset_lists_numbers_and_sizes_and_does_nothing_unasked(
    study: PaperStudy, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_below(study.config.run_dir)
    main("reset", [str(study.path), "--stage", "sparse_model", "--dry_run"])
    out = " ".join(capsys.readouterr().out.split())
    assert "24 evaluations to be deleted" in out and "│ fit │ 20 │ 0 │ 0 │ 0 │" in out
    assert "prune_fine_tune" in out and "72 s of work" in out
    assert "--yes" in failing(capsys, "reset", str(study.path), "--stage", "sparse_model")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    for answer in ("", "n", "nonsense"):
        monkeypatch.setattr("builtins.input", lambda *_, answer=answer: answer)
        main("reset", [str(study.path), "--stage", "sparse_model"])
        assert "nothing was deleted" in capsys.readouterr().out
    after = files_below(study.config.run_dir)
    assert {name: content for name, content in after.items() if "run.lock" not in name} == before
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    main("reset", [str(study.path), "--stage", "sparse_model"])
    assert study.by_status() == {"test": {"finished": 8}}


def test_a_run_in_progress_is_not_disturbed(study: PaperStudy, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLock(study.config.run_dir) as lock:
        lock.acquire()
        for command in (["reset", str(study.path), "--stage", "test", "--yes"], ["gc", str(study.path), "--yes"]):
            message = failing(capsys, *command)
            assert "in use by process" in message
            assert "--wait" not in message  # which these commands do not have
    assert study.by_status() == WHOLE


def test_a_run_folder_stands_for_its_study_and_other_settings_are_refused(
    study: PaperStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = study.config.run_dir
    (run_dir / "config.yaml").write_text(study.config.to_yaml())
    assert read_study(run_dir, None) == study.config
    main("status", [str(study.path), "--format", "json"])
    by_file = json.loads(capsys.readouterr().out)
    main("status", [str(run_dir), "--format", "json"])
    assert {**json.loads(capsys.readouterr().out), "at": 0} == {**by_file, "at": 0}
    assert "leave --outdir out" in failing(capsys, "status", str(run_dir), "--outdir", "elsewhere")
    other = study.path.with_name("other.yaml")
    changes = {"gd": study.config.gd.replace(n_steps=7), "max_device_hours": 1.0}  # the second may change
    other.write_text(study.config.replace(**changes).to_yaml())
    for command in ("status", "report", "retry", "gc"):
        message = failing(capsys, command, str(other))
        assert "gd.n_steps: saved" in message and "max_device_hours" not in message


def test_a_coalition_that_is_being_measured_keeps_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As by a process that shares the store and not the run folder."""
    study = write_study(tmp_path)
    with study.store() as store:
        study.finish(store, 10)
        assert store.claim(study.study_id(store)) is not None
        before = study.by_status()
        assert "being measured" in failing(capsys, "reset", str(study.path), "--stage", "full_model", "--yes")
        assert study.by_status() == before
        assert all(folder.exists() for folder in model_folders(study.config).values())


def test_a_reset_that_is_killed_goes_on(study: PaperStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """After any number of its steps, the same command ends as it would have; no half checkpoint is ever in place."""
    delete = upkeep.shutil.rmtree
    for n_deleted in range(3):  # of three folders, then the command is killed
        left = [n_deleted]

        def rmtree(path: Path, left: list[int] = left) -> None:
            if not left[0]:
                next(Path(path).rglob("*.safetensors")).unlink()  # half of it
                raise KeyboardInterrupt
            left[0] -= 1
            delete(path)

        with monkeypatch.context() as patch, study.store() as store:
            patch.setattr(upkeep.shutil, "rmtree", rmtree)
            found = plan_reset(study.config, "full_model", store)
            if n_deleted == 0:
                assert len(found.models) == 3
            with pytest.raises(KeyboardInterrupt) if found.models[n_deleted:] else nullcontext():
                apply_reset(found, store)
        for folder in model_folders(study.config).values():
            assert all(is_whole(path) for path in upkeep.checkpoint_folders(folder))
    with study.store() as store:
        apply_reset(plan_reset(study.config, "full_model", store), store)
    assert study.by_status() == {"test": {"finished": 8}}
    assert not any(folder.exists() for folder in model_folders(study.config).values())


def test_a_loaded_model_is_not_the_studys_to_delete(tmp_path: Path) -> None:
    study = write_study(tmp_path, full_model={"load": str(tmp_path / "elsewhere")})
    with study.store() as store:
        with pytest.raises(ConfigError, match="elsewhere"):
            plan_reset(study.config, "full_model", store)
        assert len(plan_reset(study.config, "pruned_model", store).models) == 2
        with pytest.raises(ConfigError, match=", ".join(STAGES)):
            plan_reset(study.config, "everything", store)


# gc


def test_gc_finds_each_kind_and_leaves_the_rest(study: PaperStudy, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = study.config.run_dir
    folders = model_folders(study.config)
    early = write_checkpoint(folders["full"], 100, "early")
    damaged = folders["sparse"] / "ckpt_steps_00000009.damaged-2"
    damaged.mkdir()
    (damaged / "unet.safetensors").write_text("half")
    left = run_dir / f".summary.json.{2**22 + 1}.partial"
    left.write_text("{")
    age(left)
    young = run_dir / f".young.{2**22 + 1}.partial"
    young.write_text("")
    ours = run_dir / f".mine.{os.getpid()}.partial"
    ours.write_text("at work")
    age(ours)
    backup = run_dir / "results.db.schema-1.bak"
    backup.write_text("old")
    images = run_dir / "samples"
    images.mkdir()
    (images / "grid.png").write_text("png")
    kept = files_below(run_dir)
    main("gc", [str(study.path), "--dry_run"])
    capsys.readouterr()
    assert files_below(run_dir) == kept
    with study.store() as store:
        waste = find_waste(study.config, store)
    assert {(item.kind, item.path) for item in waste.files} == {
        ("checkpoints", early),
        ("damaged", damaged),
        ("leftovers", left),
        ("backups", backup),
        ("images", images),
    }
    assert not waste.evaluations
    assert waste.n_bytes == sum(size_of(path) for path in (early, damaged, left, backup, images))
    main("gc", [str(run_dir), "--what", "checkpoints", "--yes"])
    assert not early.exists() and damaged.exists()
    main("gc", [str(run_dir), "--yes"])
    assert not any(path.exists() for path in (early, damaged, left, backup, images))
    gone = [path for path in kept if not (run_dir / path).exists()]
    assert {Path(path).parts[0] for path in gone} <= {"digits", left.name, backup.name, "samples"}
    assert young.exists() and ours.exists()
    assert all(is_whole(upkeep.checkpoint_folders(folder)[-1]) for folder in folders.values())
    assert study.by_status() == WHOLE


def test_earlier_checkpoints_stay_where_the_last_one_is_not_whole(study: PaperStudy) -> None:
    folder = model_folders(study.config)["full"]
    write_checkpoint(folder, 100, "early")
    last = upkeep.checkpoint_folders(folder)[-1]
    (last / "ema.safetensors").write_text("damaged")
    waste = find_waste(study.config, None)
    assert not waste.files
    assert any("not whole" in line for line in waste.kept)


def test_the_only_copy_of_a_checkpoint_is_not_a_leftover(study: PaperStudy) -> None:
    """Killed between its two renames, `write_whole_dir` leaves the old content under another name."""
    folder = model_folders(study.config)["sparse"]
    last = upkeep.checkpoint_folders(folder)[-1]
    only_copy = last.rename(last.with_name(f".{last.name}.{2**22 + 1}.replaced"))
    age(only_copy)
    waste = find_waste(study.config, None)
    assert not waste.files and any(str(only_copy) in line for line in waste.kept)
    write_checkpoint(folder, int(last.name.removeprefix("ckpt_steps_")), "new")
    assert [item.path for item in find_waste(study.config, None).files] == [only_copy]


def test_evaluations_that_nothing_asks_for_go(study: PaperStudy, capsys: pytest.CaptureFixture[str]) -> None:
    fewer = replace(study.record, evaluations={**study.record.evaluations, "fit": study.record.evaluations["fit"][:12]})
    fewer.write(study.config.run_dir)
    with study.store() as store:
        pilot = replace(study.specs[-1], role="pilot", removal_seed=99)
        store.add(study.study_id(store), [pilot])
        waste = find_waste(study.config, store)
        assert (len(waste.evaluations), waste.seconds) == (8, 24.0)
        assert not only(waste, ["checkpoints"])
    main("gc", [str(study.path), "--yes"])
    assert "8 that the study no longer asks for" in capsys.readouterr().out
    assert study.by_status() == {**WHOLE, "fit": {"finished": 12}, "pilot": {"pending": 1}}


def test_links_are_not_followed(study: PaperStudy, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    write_checkpoint(outside / "a", 1, "one")
    write_checkpoint(outside / "a", 2, "two")
    (outside / "x.damaged").write_text("somebody else's")
    before = files_below(outside)
    folder = model_folders(study.config)["full"]
    (study.config.run_dir / "link").symlink_to(outside, target_is_directory=True)
    (study.config.run_dir / "samples").symlink_to(outside, target_is_directory=True)
    (folder / "ckpt_steps_00000001").symlink_to(outside / "a" / "ckpt_steps_00000001", target_is_directory=True)
    (folder / "link.damaged").symlink_to(outside / "x.damaged")
    found = [item.path for item in find_waste(study.config, None).files]
    assert found == [folder / "link.damaged"], "of a link nothing goes but the link itself"
    main("gc", [str(study.path), "--yes"])
    main("reset", [str(study.path), "--stage", "full_model", "--yes"])
    assert files_below(outside) == before
    remove(study.config.run_dir / "link")
    assert files_below(outside) == before


def test_a_model_behind_a_link_is_not_the_studys_to_delete(study: PaperStudy, tmp_path: Path) -> None:
    shared = tmp_path / "another" / "study"
    shared.parent.mkdir()
    retrain = model_folders(study.config)["full"].parents[1]
    retrain.rename(shared)
    retrain.symlink_to(shared, target_is_directory=True)
    before = files_below(shared)
    with study.store() as store, pytest.raises(ConfigError, match="behind a link, and may be another study's"):
        plan_reset(study.config, "full_model", store)
    main("reset", [str(study.path), "--stage", "sparse_model", "--yes"])
    assert files_below(shared) == before


def test_a_pilot_goes_with_the_model_that_it_judged(study: PaperStudy) -> None:
    pilot = study.config.run_dir / "pilot.json"
    pilot.write_text("{}")
    with study.store() as store:
        assert pilot not in plan_reset(study.config, "fit", store).outputs
        assert pilot in plan_reset(study.config, "sparse_model", store).outputs


def test_pictures_are_results_which_the_manifest_names(study: PaperStudy) -> None:
    samples = study.config.run_dir / "samples"
    samples.mkdir()
    (samples / "full.png").write_text("png")
    assert [item.kind for item in find_waste(study.config, None).files] == ["images"]
    (samples / "pictures.json").write_text("{}")
    assert not find_waste(study.config, None)


def test_evaluations_of_a_server_go_only_when_named(
    tmp_path: Path, postgres_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run folder on another host may have a larger plan for the same study."""
    study = write_study(tmp_path, db=postgres_url)
    fewer = replace(study.record, evaluations={**study.record.evaluations, "fit": study.record.evaluations["fit"][:12]})
    fewer.write(study.config.run_dir)
    main("gc", [str(study.path), "--yes"])
    assert "kept: 8 evaluations in postgresql" in capsys.readouterr().out
    assert study.by_status()["fit"] == {"pending": 20}
    main("gc", [str(study.path), "--what", "evaluations", "--yes"])
    assert study.by_status()["fit"] == {"pending": 12}


def test_the_backup_of_a_store_that_others_use_stays(tmp_path: Path) -> None:
    study = write_study(tmp_path, db=str(tmp_path / "shared.db"))
    backup = tmp_path / "shared.db.schema-1.bak"
    backup.write_text("old")
    with study.store() as store:
        assert [item.path for item in find_waste(study.config, store).files] == [backup]
        store.open_study("theirs", dataset="digits", contributor_names=["a"], n_examples=[1], fingerprint="f")
        assert not find_waste(study.config, store)


def test_what_a_process_has_open_stays(study: PaperStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folders(study.config)["full"]
    early, later = write_checkpoint(folder, 100, "early"), write_checkpoint(folder, 200, "later")
    monkeypatch.setattr(upkeep, "paths_in_use", lambda: {(early / "unet.safetensors").resolve()})
    waste = find_waste(study.config, None)
    assert [item.path for item in waste.files] == [later]
    assert any("in use" in line and str(early) in line for line in waste.kept)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the system has no /proc")
def test_open_files_of_other_processes_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "mapped"
    path.write_bytes(bytes(8192))
    source = (
        "import mmap, sys; file = open(sys.argv[1], 'rb')\n"
        "held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)\n"
        "file.close(); print('ready', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", source, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert path in upkeep.paths_in_use()
    process.communicate("")
    assert path not in upkeep.paths_in_use()


def test_the_cache_is_listed_with_its_last_use_and_emptied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("TRIBUTE_CACHE", str(cache))
    for name in ("tensors/abc", "latents/def", "references/ghi/statistics/x", "classifiers/jkl"):
        (cache / name).mkdir(parents=True)
        (cache / name / "arrays.npy").write_text(name)
    (cache / "tensors" / "abc.lock").write_text("")
    (cache / "tensors" / "old.damaged-0").mkdir()
    (cache / "latents" / ".new.unfinished").mkdir()
    (cache / "latents" / ".old.unfinished").mkdir()
    age(cache / "latents" / ".old.unfinished")
    age(cache / "classifiers" / "jkl", 3600.0 * 24)
    (cache / "somebody_elses").mkdir()
    (cache / "classifiers" / "link").symlink_to(tmp_path, target_is_directory=True)
    waste = find_cache_waste(cache)
    assert {(item.kind, item.path.name) for item in waste.files} == {
        ("cache", "abc"),
        ("cache", "def"),
        ("cache", "ghi"),
        ("cache", "jkl"),
        ("damaged", "old.damaged-0"),
        ("leftovers", ".old.unfinished"),
    }
    used = {item.path.name: time.time() - item.last_used for item in waste.files}
    assert used["jkl"] == pytest.approx(86400.0, abs=600.0) and used["abc"] < 600.0
    assert "--yes" in failing(capsys, "gc", "--cache")
    main("gc", ["--cache", "--yes"])
    capsys.readouterr()
    names = {path.name for path in cache.rglob("*")}
    assert names == {
        *("tensors", "latents", "references", "classifiers", "somebody_elses", "link"),
        *("abc.lock", ".new.unfinished"),
    }


def test_gc_needs_to_know_what_it_looks_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--cache" in failing(capsys, "gc")
    assert "no run folder" in failing(capsys, "gc", str(tmp_path))


def test_a_moved_run_folder_is_looked_at_where_it_is(study: PaperStudy, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    study.config.run_dir.rename(moved / "paper")
    early = write_checkpoint(moved / "paper" / "digits/retrain/models/full", 100, "early")
    main("gc", [str(moved / "paper"), "--yes"])
    assert not early.exists()


def test_a_deletion_renames_first_and_says_what_it_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_checkpoint(tmp_path, 5, "x")
    seen: list[str] = []
    monkeypatch.setattr(upkeep.shutil, "rmtree", lambda found: seen.append(Path(found).name))
    remove(path)
    assert seen == [f".{path.name}.{os.getpid()}.deleted"]
    remove(tmp_path / "missing")

    def refuse(_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(upkeep.shutil, "rmtree", refuse)
    with pytest.raises(StoreError, match="cannot be deleted"):
        remove(write_checkpoint(tmp_path, 6, "y"))


def test_nobody_is_asked_without_a_terminal() -> None:
    assert confirm("Sure?", yes=True)
    with pytest.raises(ConfigError, match="--yes"):
        confirm("Sure?", yes=False)


def test_a_store_that_is_missing_is_no_obstacle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = write_study(tmp_path)
    Path(study.config.db_url).unlink()
    assert "is not there" in failing(capsys, "retry", str(study.path))
    main("gc", [str(study.path), "--yes"])
    main("reset", [str(study.path), "--stage", "sparse_model", "--yes"])
    assert not model_folders(study.config)["sparse"].exists()
    assert not Path(study.config.db_url).exists()


def test_clean_takes_only_what_it_was_given(study: PaperStudy) -> None:
    with Store.open(study.config.db_url) as store:
        clean(upkeep.Waste(), store)
    assert study.by_status() == WHOLE
