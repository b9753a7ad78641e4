"""The section Training-data credit: complete, and safe whatever contributors call themselves."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tribute.errors import StoreError
from tribute.study.model_card import MAX_NAME_LENGTH, credit_section, escape, model_card

HOSTILE = [
    "| x | y |",
    "<script>alert(1)</script>",
    "[free money](https://example.org)",
    "![pixel](http://example.org/p.png)",
    "**bold** _it_ `code` ~~gone~~ # head",
    "a\n\n# Heading\n- item",
    "www.example.org me@example.org @someone #1",
    "\\| \\` &lt;b&gt; &amp;",
    "left\u202eright\u2066\u200b",
    "$$x^2$$ <!-- hidden",
    "",
    "x" * 500,
]


def summary(names: list[str], **changes: Any) -> dict[str, Any]:
    n = len(names)
    fitted = {
        "estimator": "gp",
        "n_coalitions": 40,
        "values": [0.5 - i for i in range(n)],
        "intervals_95": [[0.25 - i, 0.75 - i] for i in range(n)],
        "shares": [0.125] * n,
        "warning": None,
    }
    score = {"mean": 0.62, "interval_95": [0.41, 0.78]}
    behavior = {
        "higher_is_better": True,
        "v_empty": [1.0, 2.0],
        "v_grand": [9.0],
        "n_test_coalitions": 12,
        "attributions": {"shapley": {**fitted, **changes}},
        "lds": {"shapley": score},
    }
    return {
        "name": "tiny",
        "contributors": [{"name": name, "n_examples": 1000 + i} for i, name in enumerate(names)],
        "behaviors": {"inception_score": behavior},
        "provenance": {"tribute": "0.1.0"},
    }


def section_of(values: dict[str, Any], folder: Path) -> str:
    (folder / "summary.json").write_text(json.dumps(values))
    return credit_section(folder)


def test_the_section_says_who_how_much_how_sure_and_how_good(tmp_path: Path) -> None:
    text = section_of(summary(["Ann", "Bo", "Cy"]), tmp_path)
    assert text.startswith("## Training-data credit\n")
    assert "| Ann | 1,000 | 0.5 | 0.25 to 0.75 | 12.5% |\n| Bo | 1,001 | -0.5 | -0.75 to -0.25 | 12.5% |" in text
    assert "62.0 (41.0 to 78.0)" in text
    assert "v(nobody) = 1.5, v(everybody) = 9" in text
    assert "arXiv:2407.03153" in text
    assert "**Limits.**" in text


def test_who_improves_the_behavior_most_stands_first(tmp_path: Path) -> None:
    values = summary(["Ann", "Bo", "Cy"])
    values["behaviors"]["inception_score"]["higher_is_better"] = False
    text = section_of(values, tmp_path)
    assert text.index("| Cy |") < text.index("| Bo |") < text.index("| Ann |")
    assert "lower is better" in text


def test_what_is_unknown_is_not_made_up(tmp_path: Path) -> None:
    values = summary(["Ann"], shares=[None], intervals_95=[[None, None]], warning="poor fit (R2 0.10)")
    values["behaviors"]["inception_score"]["lds"] = {}
    text = section_of(values, tmp_path)
    assert "| Ann | 1,000 | 0.5 | - | - |" in text
    assert "not validated on retrained models" in text
    assert "poor fit" in text


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_text_and_nothing_else(name: str, tmp_path: Path) -> None:
    text = section_of(summary([name, "Bo"]), tmp_path)
    plain = section_of(summary(["Al", "Bo"]), tmp_path)
    assert text.count("\n") == plain.count("\n")
    cell = escape(name)
    assert re.fullmatch(r"(\w| |&#\d+;)+|\(no name\)", cell)
    assert text.replace(f"| {cell} |", "| Al |") == plain
    assert len(html.unescape(cell)) <= MAX_NAME_LENGTH


def test_the_name_that_a_reader_sees_is_the_contributors() -> None:
    for name in ("Ann O'Neil & Söhne", "vendor-07", "100% (b_c)", "李明"):
        assert html.unescape(escape(name)) == name


def test_a_model_card_begins_with_front_matter_for_the_hub(tmp_path: Path) -> None:
    section_of(summary(["Ann"]), tmp_path)
    text = model_card(tmp_path, title="my_model", usage="import diffusers")
    assert text.startswith("---\nlibrary_name: diffusers\n")
    assert "# my&#95;model" in text
    assert "```python\nimport diffusers\n```" in text
    assert text.endswith("\n")


@pytest.mark.parametrize("content", [None, "{", "{}", "[]", '{"contributors": [], "behaviors": {"a": {}}}'])
def test_a_folder_without_a_finished_study_is_named(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(StoreError, match=r"summary\.json"):
        credit_section(tmp_path)
