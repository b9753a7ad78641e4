"""The files of results have the layouts that are documented, for people and for programs."""

from __future__ import annotations

import csv
import importlib.resources
import io
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_outputs import NAMES, study

from tribute.errors import StoreError
from tribute.report.payout import pay_out, payout_csv
from tribute.store.columns import parquet_bytes
from tribute.store.records import Store
from tribute.study.outputs import (
    ATTRIBUTION_COLUMNS,
    ATTRIBUTIONS_SCHEMA,
    SUMMARY_SCHEMA,
    attributions_csv,
    attributions_parquet,
    summary,
    write_outputs,
)
from tribute.study.record import StudyRecord, by_role
from tribute.study.results import StudyResult, count_by_role
from tribute.types import Attributions

PAGE = (Path(__file__).parents[2] / "docs" / "outputs.md").read_text(encoding="utf-8")
SCHEMA = json.loads((importlib.resources.files("tribute") / "report" / "summary.schema.json").read_text())


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    return study(tmp_path_factory.mktemp("study"))


def documented(title: str) -> list[str]:
    """First column of the tables in a section of the page, but those of files and policies."""
    text = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert text
    tables = re.findall(r"^\| (?:column|key) \|.*?(?=\n\n|\Z)", text[1], re.MULTILINE | re.DOTALL)
    return [name for table in tables for name in re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)]


# A small part of JSON Schema: what the schema of the summary uses.


def wrong(value: Any, schema: dict[str, Any], where: str = "$") -> Iterator[str]:
    """What is wrong with a value, one line each."""
    known = {"$schema", "$id", "$defs", "$ref", "title", "description", "const", "type", "properties", "required"}
    known |= {"additionalProperties", "items", "anyOf", "minItems", "maxItems", "minimum", "pattern"}
    assert set(schema) <= known, f"{where}: this test does not know {set(schema) - known}"
    if "$ref" in schema:
        yield from wrong(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], where)
    if "anyOf" in schema and all(list(wrong(value, option, where)) for option in schema["anyOf"]):
        yield f"{where}: {value!r} is none of the alternatives"
    if "const" in schema and value != schema["const"]:
        yield f"{where}: expected {schema['const']!r}, found {value!r}"
    kinds = schema.get("type", [])
    if kinds and kind_of(value) not in allowed_kinds([kinds] if isinstance(kinds, str) else kinds):
        yield f"{where}: expected {kinds}, found {value!r}"
        return
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        yield f"{where}: {value!r} is not {schema['pattern']}"
    if isinstance(value, int | float) and value < schema.get("minimum", -np.inf):
        yield f"{where}: {value} is below {schema['minimum']}"
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", np.inf):
            yield f"{where}: has {len(value)} items"
        for i, item in enumerate(value):
            yield from wrong(item, schema.get("items", {}), f"{where}[{i}]")
    if isinstance(value, dict):
        yield from (f"{where}: lacks {name}" for name in schema.get("required", []) if name not in value)
        for name, item in value.items():
            properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
            if name in properties:
                yield from wrong(item, properties[name], f"{where}.{name}")
            elif others is False:
                yield f"{where}: {name} is not in the layout"
            elif isinstance(others, dict):
                yield from wrong(item, others, f"{where}.{name}")


def kind_of(value: Any) -> str:
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return "null" if value is None else kinds[type(value)]


def allowed_kinds(names: list[str]) -> set[str]:
    return set(names) | ({"integer"} if "number" in names else set())


def dotted(schema: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Keys of the layout as the page writes them: those of free objects by NAME, KERNEL, ROLE or METHOD."""
    free = {"behaviors": "NAME", "evaluations": "ROLE", "attributions": "KERNEL", "lds": "KERNEL"}
    free["median_seconds_per_coalition"] = "METHOD"
    for key, item in schema.get("properties", {}).items():
        found = resolved(item)
        others = found.get("additionalProperties")
        objects = [option for option in found.get("anyOf", []) if option.get("type") == "object"]
        if key in free and isinstance(others, dict):
            yield from dotted(resolved(others), f"{prefix}{key}.{free[key]}.")
            continue
        if found.get("items", {}).get("type") == "object":
            yield from dotted(found["items"], f"{prefix}{key}.")
            continue
        yield f"{prefix}{key}"
        if objects:
            yield from dotted(objects[0], f"{prefix}{key}.")


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    return SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")] if "$ref" in schema else schema


def plain(result: StudyResult) -> Any:
    """A summary as it is read from its file."""
    return json.loads(json.dumps(summary(result), allow_nan=False))


def test_a_summary_has_its_documented_layout(result: StudyResult) -> None:
    counts = {"fit": {"planned": 3, "pending": 0, "running": 0, "finished": 2, "failed": 1}}
    content = plain(replace(result, counts=counts, timings={"gd": {"n_evaluations": 3, "total": 1.5, "train": 1.0}}))
    assert list(wrong(content, SCHEMA)) == []
    assert content["schema"] == SUMMARY_SCHEMA == SCHEMA["properties"]["schema"]["const"]
    assert documented("summary.json") == list(dotted(SCHEMA))
    unknown = Attributions(np.arange(6.0) - 2.5, np.full((6, 6), np.nan), "shapley", "gp", "analytic", 6, 6, np.nan)
    item = replace(result.behaviors[0], attributions={"shapley": unknown}, validations={})
    content = plain(replace(result, behaviors=[item]))
    assert list(wrong(content, SCHEMA)) == []
    entry = content["behaviors"]["rise"]["attributions"]["shapley"]
    assert entry["standard_errors"] == entry["shares"] == [None] * 6
    assert entry["intervals_95"] == [[None, None]] * 6


def test_a_summary_with_another_layout_is_noticed(result: StudyResult) -> None:
    for change in (
        lambda s: s.update(schema="tribute.summary/2"),
        lambda s: s.pop("evaluations"),
        lambda s: s.update(config_fingerprint="abc"),
        lambda s: s["contributors"][0].update(n_examples=-1),
        lambda s: s["contributors"][0].update(age=3),
        lambda s: s["behaviors"]["rise"]["attributions"].pop("shapley"),
        lambda s: s["behaviors"]["rise"]["attributions"]["shapley"].update(noise_sd="0.1"),
        lambda s: s["behaviors"]["rise"]["attributions"]["shapley"]["intervals_95"][0].pop(),
        lambda s: s["behaviors"]["rise"]["lds"]["loo"]["less_shapley"].pop("probability"),
        lambda s: s["behaviors"]["rise"]["attributions"]["shapley"].update(n_coalitions=1.5),
    ):
        content = plain(result)
        change(content)
        assert len(list(wrong(content, SCHEMA))) == 1


def test_the_table_of_attributions_is_the_same_in_parquet_with_names_as_they_are(result: StudyResult) -> None:
    unknown = Attributions(np.arange(6.0), np.full((6, 6), np.nan), "shapley", "gp", "analytic", 6, 6, 0.0)
    poor = replace(result.behaviors[1], attributions={"shapley": unknown})
    mixed = replace(result, behaviors=[result.behaviors[0], poor])
    table = pq.read_table(io.BytesIO(attributions_parquet(mixed)))
    assert table.column_names == list(ATTRIBUTION_COLUMNS) == documented("attributions")
    assert table.schema.metadata[b"schema"] == ATTRIBUTIONS_SCHEMA.encode()
    rows = list(csv.DictReader(io.StringIO(attributions_csv(mixed))))
    assert len(rows) == table.num_rows == 6 * (len(result.behaviors[0].attributions) + 1)
    assert list(rows[0]) == table.column_names
    for row, stored in zip(rows, table.to_pylist(), strict=True):
        assert stored["contributor"] in NAMES
        assert row["contributor"] == ("'=Flo" if stored["contributor"] == "=Flo" else stored["contributor"])
        for name, kind in ATTRIBUTION_COLUMNS.items():
            if kind == "number":
                assert row[name] == ("" if stored[name] is None else f"{stored[name]:.8g}")
            elif kind == "integer":
                assert int(row[name]) == stored[name]
    fitted = result.behaviors[0].attributions["shapley"]
    assert table["attribution"].to_pylist()[:6] == fitted.values.tolist()
    assert table["low_95"].to_pylist()[-6:] == [None] * 6
    assert {path.name for path in write_outputs(result)} >= {"attributions.parquet", "attributions.csv", "summary.json"}


def test_columns_that_are_no_table_are_refused() -> None:
    with pytest.raises(StoreError, match="as many values in each"):
        parquet_bytes({"a": ("text", ["x"]), "b": ("integer", [1, 2])}, schema="s")
    for kind, value in (("integer", "x"), ("integer", 1.5), ("text", 3), ("number", "x"), ("text", "\ud800")):
        with pytest.raises(StoreError, match=f"expected a {kind}"):
            parquet_bytes({"a": (kind, [value])}, schema="s")  # type: ignore[arg-type]


def test_other_files_have_the_documented_keys(result: StudyResult) -> None:
    payout = pay_out(
        result.behaviors[0].attributions["shapley"],
        higher_is_better=True,
        budget="100",
        currency="EUR",
        behavior_name="rise",
    )
    assert next(csv.reader(io.StringIO(payout_csv([payout], NAMES, [1] * 6)))) == documented("payout")
    record = StudyRecord("known", "digits", NAMES, (10,) * 6, "data", ("rise",), {}, {}, None, {})
    assert documented("study.json") == list(asdict(record))


def test_what_was_set_aside_is_counted(tmp_path: Path) -> None:
    study(tmp_path)
    with Store.open(tmp_path / "results.db") as store:
        found = store.find()
        study_id = found[0].study_id
        specs = [item.spec for item in found]
        record = StudyRecord("known", "digits", NAMES, (10,) * 6, "data", ("rise",), by_role(specs), {}, None, {})
        counts = count_by_role(record, store)
        none = {"pending": 0, "running": 0, "failed": 0}
        assert counts["fit"] == {"planned": 40, "finished": 40, **none}
        assert counts["test"] == {"planned": 24, "finished": 24, **none}
        more = [replace(specs[0], opt_seed=seed) for seed in (91, 92, 93, 94)]
        store.add(study_id, more[:3])
        for status in ("failed", "running"):
            claimed = store.claim(study_id)
            assert claimed is not None
            if status == "failed":
                store.fail(claimed, "it is not a number")
        counts = count_by_role(replace(record, evaluations=by_role([*specs, *more])), store)
        assert counts["empty"] == {"planned": 6, "finished": 2, "failed": 1, "running": 1, "pending": 2}
