from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tribute.errors import MixedResultsError, StoreError
from tribute.seeding import numpy_stream
from tribute.store.interchange import PUBLISHED_BEHAVIOR_KEYS, export_csv, export_jsonl, import_jsonl
from tribute.store.records import EvaluationSpec, FinishedEvaluation, Store, StoredEvaluation, Study

OWNERS = np.array([0, 2, 1, 1, 2, 0, 0, 3])  # contributor of each example
STUDY = Study("main", "digits", ("ann", "=bob", "chlöe\n", "dan"), (3, 2, 2, 1), "print")


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Callable[[str], Store]]:
    stores = []

    def open_one(name: str) -> Store:
        stores.append(Store.open(tmp_path / f"{name}.db"))
        return stores[-1]

    yield open_one
    for store in stores:
        store.close()


@pytest.fixture
def store(open_store: Callable[[str], Store]) -> Store:
    """Two studies with results of all kinds, and one evaluation that is still to be done."""
    store = open_store("results")
    results = [
        FinishedEvaluation(
            spec=EvaluationSpec(
                exp_name="e1",
                dataset="digits",
                method="gd" if seed else "retrain",
                removal_dist="shapley" if seed else None,
                datamodel_alpha=0.1 if seed == 3 else None,
                removal_seed=seed or None,
                coalition_mask=numpy_stream(0, "test-mask", seed).random(4) < 0.5,
                opt_seed=seed % 2,
                settings={"gd_steps": 200, "lr": 1 / 3} if seed else {},
                role="fit" if seed else "grand",
                priority=seed,
            ),
            behaviors={"fid": 1 / (seed + 3), "inception_score": 1.5, "my:module": 0.1 * seed},
            seconds={"train": 1.25, "sample": 0.1 + seed, "features": 3.0},
            provenance={"device": "cpu", "published": {"trained_steps": 5}} if seed else {},
            definitions={"fid": {"unit": "1"}},
        )
        for seed in range(6)
    ]
    other = Study("other", "cifar", ("x", "y"), (1, 1), "print2")
    spec = EvaluationSpec("e", "cifar", "gd", None, None, None, np.array([False, False]), 0, {})
    store.add_finished({STUDY: results, other: [FinishedEvaluation(spec, {"fid": 2.0})]})
    (study_id,) = (s.study_id for s in store.studies(name="main"))
    store.add(study_id or 0, [EvaluationSpec("e2", "digits", "gd", None, None, None, np.ones(4, bool), 0, {})])
    return store


def content(stored: StoredEvaluation) -> tuple[Any, ...]:
    """All that must survive an exchange."""
    spec = stored.spec
    result = (stored.behaviors, stored.seconds, stored.provenance, stored.definitions)
    return (spec.identity, spec.role, spec.priority, stored.status, stored.study_id, *result)


@pytest.mark.parametrize("by_example", [False, True])
def test_an_exchange_changes_nothing(
    store: Store, open_store: Callable[[str], Store], tmp_path: Path, by_example: bool
) -> None:
    owners = OWNERS if by_example else None
    first, second = tmp_path / "first.jsonl", tmp_path / "new" / "second.jsonl"
    n_lines = export_jsonl(store, first, contributor_of_example=owners, dataset="digits")
    n_lines += 0 if by_example else export_jsonl(store, first)  # without examples, all studies fit in one file
    copy = open_store("copy")
    assert import_jsonl(copy, first, contributor_of_example=owners) == (6 if by_example else 7)
    assert import_jsonl(copy, first, contributor_of_example=owners) == 0
    export_jsonl(copy, second, contributor_of_example=owners)
    assert first.read_bytes() == second.read_bytes()
    statuses: Any = {"statuses": ["finished"]} | ({"dataset": "digits"} if by_example else {})
    assert [content(s) for s in copy.find()] == [content(s) for s in store.find(**statuses)]
    assert copy.studies() == store.studies()[: 1 if by_example else 2]


def test_a_file_by_example_is_read_without_the_examples_when_the_lines_say_who_is_present(
    store: Store, open_store: Callable[[str], Store], tmp_path: Path
) -> None:
    path = tmp_path / "results.jsonl"
    export_jsonl(store, path, contributor_of_example=OWNERS, dataset="digits")
    copy = open_store("copy")
    assert import_jsonl(copy, path) == 6
    assert [s.spec for s in copy.find()] == [s.spec for s in store.find(dataset="digits", statuses=["finished"])]


def test_the_lines_have_the_published_layout(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    export_jsonl(store, path, contributor_of_example=OWNERS.tolist(), dataset="digits")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    results = store.find(dataset="digits", statuses=["finished"])
    assert len(lines) == len(results) == 6
    for line, stored in zip(lines, results, strict=True):
        present = {i for i, owner in enumerate(OWNERS) if stored.spec.coalition_mask[owner]}
        assert set(line["remaining_idx"]) == present
        assert set(line["removed_idx"]) == set(range(8)) - present
        assert (line["fid_value"], line["is"]) == (stored.behaviors["fid"], 1.5)
        assert line["precision"] is None and line["total_steps_time"] == 1.25
        assert line["total_sampling_time"] == stored.seconds["sample"]
        assert line["method"] == stored.spec.method and line["gd_steps"] == stored.spec.settings.get("gd_steps")
        assert line.get("trained_steps") == (None if line["removal_seed"] is None else 5)


def published(**changes: Any) -> dict[str, Any]:
    """A line as the reference implementation writes them."""
    line = {
        "dataset": "cifar20",
        "method": "gd",
        "exp_name": "shapley",
        "removal_dist": "datashapley",
        "datamodel_alpha": None,
        "removal_seed": 3,
        "remaining_idx": [2, 3],
        "removed_idx": [0, 1, 4, 5, 6, 7],
        "gd_steps": 1000,
        "total_steps_time": 12.5,
        "total_sampling_time": "7.5",
        "is": 4.5,
        "fid_value": "31.25",
        "precision": None,
        "lr": 1e-4,
        "device": "cuda:0",
    }
    return {key: value for key, value in (line | changes).items() if value is not ...}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_a_published_line_becomes_an_evaluation(open_store: Callable[[str], Store], tmp_path: Path) -> None:
    store = open_store("s")
    path = write(tmp_path / "db.jsonl", published(), "", published(removal_seed=4, remaining_idx=[2.0, 3.0]))
    names = ["a", "b", "c", "d"]
    given: dict[str, Any] = {"contributor_names": names, "contributor_of_example": OWNERS}
    assert import_jsonl(store, path, **given) == 2
    assert import_jsonl(store, path, **given) == 0
    first = store.find()[0]
    assert first.spec.coalition_mask.tolist() == [False, True, False, False]
    assert first.spec.removal_dist == "shapley" and dict(first.spec.settings) == {"gd_steps": 1000}
    assert first.behaviors == {"inception_score": 4.5, "fid": 31.25}
    assert first.seconds == {"train": 12.5, "sample": 7.5}
    assert first.provenance == {"published": {"lr": 1e-4, "device": "cuda:0"}}
    (study,) = store.studies()
    assert (study.name, study.contributor_names, study.n_examples) == ("imported", tuple(names), (3, 2, 2, 1))
    back = tmp_path / "back.jsonl"
    export_jsonl(store, back, contributor_of_example=OWNERS)
    line = json.loads(back.read_text().splitlines()[0])
    wanted = published(removal_dist="shapley", total_sampling_time=7.5, fid_value=31.25)
    assert {key: line[key] for key in wanted} == wanted


def test_local_behaviors_have_their_published_keys(open_store: Callable[[str], Store], tmp_path: Path) -> None:
    published = {"avg_mse": 0.25, "avg_total_loss": 0.5, "generated_image_0_ssim": 0.75}
    line = {"dataset": "digits", "method": "gd", "remaining_idx": [0], "removed_idx": [1], "trained_steps": 7}
    path = tmp_path / "there.jsonl"
    path.write_text(json.dumps(line | {key: f"{value:.8e}" for key, value in published.items()}))
    store = open_store("local")
    assert import_jsonl(store, path) == 1
    (read,) = store.find()
    assert read.behaviors == published
    assert read.provenance["published"] == {"trained_steps": 7}
    ours = FinishedEvaluation(
        EvaluationSpec("e2", "digits", "gd", None, None, None, np.array([True, False]), 0, {}),
        published | {"avg_elbo_loss": 2.0},
        definitions={"avg_mse": {"higher_is_better": False}},
    )
    study = Study("imported", "digits", read_names(store), (1, 1), store.studies()[0].fingerprint)
    store.add_finished({study: [ours]})
    export_jsonl(store, tmp_path / "out.jsonl")
    lines = [json.loads(text) for text in (tmp_path / "out.jsonl").read_text().splitlines()]
    for written in lines:
        assert {key: written[key] for key in published} == published
    assert lines[1]["tribute"]["behaviors"] == {"avg_elbo_loss": 2.0}
    again = open_store("again")
    assert import_jsonl(again, tmp_path / "out.jsonl") == 2
    assert [item.behaviors for item in again.find()] == [item.behaviors for item in store.find()]
    assert again.find()[1].definitions == ours.definitions


def read_names(store: Store) -> tuple[str, ...]:
    return store.studies()[0].contributor_names


def test_hundreds_of_behaviors_are_described_in_a_line(open_store: Callable[[str], Store]) -> None:
    store = open_store("many")
    values = {f"generated_image_{i}_{name}": 0.1 * i for i in range(100) for name in ("mse", "ssim")} | {"avg_mse": 1.0}
    spec = EvaluationSpec("e", "digits", "gd", None, None, None, np.array([True, False]), 0, {})
    store.add_finished({Study("many", "digits", ("a", "b"), (1, 1), "print"): [FinishedEvaluation(spec, values)]})
    assert "behaviors: avg_mse, generated_image_0_mse, and 199 more of single images" in store.describe()
    np.testing.assert_allclose(store.read(behavior_name="generated_image_42_ssim").behaviors, [4.2])


def test_without_examples_every_index_is_a_contributor(open_store: Callable[[str], Store], tmp_path: Path) -> None:
    store = open_store("s")
    assert import_jsonl(store, write(tmp_path / "db.jsonl", published(), published(removal_seed=5))) == 2
    assert store.studies()[0].contributor_names == tuple("01234567")
    assert np.flatnonzero(store.find()[0].spec.coalition_mask).tolist() == [2, 3]
    one_list = write(tmp_path / "one.jsonl", published(removal_seed=6, removed_idx=...))
    assert import_jsonl(store, one_list) == 1
    assert store.find()[2].spec.coalition_mask.tolist() == store.find()[0].spec.coalition_mask.tolist()
    with pytest.raises(StoreError, match="both remaining_idx and removed_idx"):
        import_jsonl(store, one_list, study_name="new")


def test_only_one_dataset(open_store: Callable[[str], Store], tmp_path: Path) -> None:
    store = open_store("s")
    path = write(tmp_path / "db.jsonl", published(), published(dataset="celeba"))
    assert import_jsonl(store, path, dataset="celeba", contributor_of_example=OWNERS) == 1
    assert [study.dataset for study in store.studies()] == ["celeba"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "JSON object"),
        ("[1, 2]", "must be an object"),
        ('{"dataset": NaN}', "finite numbers.*NaN"),
        (published(dataset=...), "'dataset' must be text"),
        (published(method=3), "'method' must be text"),
        (published(removal_seed=1.5), "'removal_seed' must be a whole number"),
        (published(removal_seed=True), "'removal_seed' must be a whole number"),
        (published(fid_value="good"), "'fid_value' must be a finite number"),
        (json.dumps(published()).replace("4.5", "1e999"), "'is' must be a finite number"),
        (published(is_=1, **{"is": None, "fid_value": None}), "at least one behavior"),
        (published(remaining_idx="2 3"), "'remaining_idx' must be a list"),
        (published(remaining_idx=[2, "3"]), "'remaining_idx' must be a whole number"),
        (published(remaining_idx=[2, 8]), "within 0 and 7; found 8"),
        (published(remaining_idx=[2, -1]), "within 0 and 7; found -1"),
        (published(remaining_idx=[2, 2, 3]), "every index once"),
        (published(removed_idx=[0, 1, 3, 4, 5, 6, 7]), "divide the 8 indices"),
        (published(removed_idx=[0, 1, 4, 5, 6]), "divide the 8 indices"),
        (published(removed_idx=..., remaining_idx=...), "found neither"),
        (published(remaining_idx=[2], removed_idx=[0, 1, 3, 4, 5, 6, 7]), r"'b' \(contributor 1\).* 1 of 2"),
        (published(tribute={"study": "x"}), "'contributor_names' must be a list"),
        (published(removal_seed=3, fid_value=99), "line 1 has the same evaluation"),
    ],
)
def test_a_broken_line_is_named_and_nothing_is_imported(
    open_store: Callable[[str], Store], tmp_path: Path, line: Any, message: str
) -> None:
    store = open_store("s")
    path = write(tmp_path / "db.jsonl", published(), published(removal_seed=4), line)
    with pytest.raises((StoreError, MixedResultsError), match=rf"db\.jsonl, line 3: .*{message}"):
        import_jsonl(store, path, contributor_names=list("abcd"), contributor_of_example=OWNERS)
    assert store.studies() == [] and store.find() == []


def test_results_that_contradict_the_store_are_refused(open_store: Callable[[str], Store], tmp_path: Path) -> None:
    store = open_store("s")
    import_jsonl(store, write(tmp_path / "one.jsonl", published()))
    two = write(tmp_path / "two.jsonl", published(removal_seed=9), published(fid_value=1))
    with pytest.raises(MixedResultsError, match="is finished with"):
        import_jsonl(store, two)
    assert len(store.find()) == 1


def test_other_contributors_are_refused(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    export_jsonl(store, path, dataset="digits")
    with pytest.raises(MixedResultsError, match=r"line 1: .*'ann'"):
        import_jsonl(store, path, contributor_names=["a", "b", "c", "d"])
    with pytest.raises(MixedResultsError, match=r"line 1: .*own"):
        import_jsonl(store, path, contributor_of_example=[0, 1, 2, 3])
    with pytest.raises(MixedResultsError, match="own"):
        export_jsonl(store, path, contributor_of_example=[0, 1, 2, 3])
    with pytest.raises(StoreError, match="one contributor index"):
        import_jsonl(store, path, contributor_of_example=np.array([0.5]))
    import_jsonl(store, write(tmp_path / "db.jsonl", published()))
    with pytest.raises(MixedResultsError, match="line 1: study 'imported'"):
        import_jsonl(store, tmp_path / "db.jsonl", contributor_names=list("abcdefgh"))


def test_files_appear_whole_or_not_at_all(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "out" / "results.jsonl"
    export_jsonl(store, path, dataset="digits")
    before = path.read_bytes()
    with pytest.raises(MixedResultsError):
        export_jsonl(store, path, contributor_of_example=[0])
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    with pytest.raises(StoreError, match="Give another path"):
        export_jsonl(store, path / "below" / "a file.jsonl")
    with pytest.raises(StoreError, match="cannot be read"):
        import_jsonl(store, tmp_path / "missing.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"dataset": "\xff"}')
    with pytest.raises(StoreError, match="UTF-8"):
        import_jsonl(store, tmp_path / "latin.jsonl")


def test_a_table_of_results(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    assert export_csv(store, path) == 7
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row, stored in zip(rows, store.find(statuses=["finished"]), strict=True):
        assert [int(i) for i in row["present_idx"].split()] == np.flatnonzero(stored.spec.coalition_mask).tolist()
        assert int(row["n_contributors"]) == len(stored.spec.coalition_mask)
        assert float(row["fid"]) == stored.behaviors["fid"]
        assert row["exp_name"] == stored.spec.exp_name and row["removal_seed"] == str(
            "" if stored.spec.removal_seed is None else stored.spec.removal_seed
        )
        assert json.loads(row["settings"]) == stored.spec.settings
    assert rows[-1]["inception_score"] == "" and rows[-1]["study"] == "other"
    assert export_csv(store, path, exp_name="nothing") == 0


def test_every_published_key_stands_for_one_behavior() -> None:
    assert len(set(PUBLISHED_BEHAVIOR_KEYS.values())) == len(PUBLISHED_BEHAVIOR_KEYS)
    assert {"is", "fid_value", "precision", "recall", "entropy"} <= set(PUBLISHED_BEHAVIOR_KEYS.values())
