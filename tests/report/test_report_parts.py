"""Names, numbers, axes, labels and colors of a report."""

from __future__ import annotations

import re
import unicodedata
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tribute.report import charts
from tribute.report.behavior_page import prefix_sizes, with_whole_pairs
from tribute.report.charts import Axis
from tribute.report.glossary import GLOSSARY, behavior_words
from tribute.report.names import MAX_EMS_IN_CHART, MAX_SHOWN, NO_NAME, labels, shortened, visible, without_places
from tribute.report.numbers import between, decimals_for, duration, fixed, listed, percent, significant
from tribute.report.render import TEMPLATES
from tribute.report.sentences import Measured, answer, names_in_words, number, say
from tribute.types import Attributions

FEW = settings(max_examples=50, deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "[Errno 28] No space left on device: '/home/alice/runs/x/results.db'",
            "[Errno 28] No space left on device: 'results.db'",
        ),
        ("~/data/a.png and C:\\Users\\alice\\b.png", "a.png and b.png"),
        ("weights=/scratch/bob/inception.pt", "weights=inception.pt"),
        ("1/2 of them, and/or https://example.org/a/b stay", "1/2 of them, and/or https://example.org/a/b stay"),
        ("runs/x/y is relative", "runs/x/y is relative"),
    ],
)
def test_a_page_names_no_folder_of_a_machine(text: str, shown: str) -> None:
    assert without_places(text) == shown


@pytest.mark.parametrize("direction", [1, -1])
def test_an_interval_speaks_of_the_size_beside_it(direction: int) -> None:
    """Where less is better, lower by 5 is within -0.88 to 10.88, not within -10.88 to 0.88."""
    values = direction * np.array([5.0, 1.0])
    about = Measured(
        title="FID",
        unit="",
        direction=direction,
        fitted=Attributions(values, 9.0 * np.eye(2), "shapley", "gp", "analytic", 10, 2, 0.0),
        names=labels(["a", "b"]),
        n_examples=[10, 10],
        shares=np.array([5 / 6, 1 / 6]),
        order=np.array([0, 1]),
        ranks=np.array([[1, 2], [1, 2]]),
        decimals=2,
        v_empty=0.0,
        v_grand=float(values.sum()),
        shares_mean_something=False,
    )
    text = "".join(segment.text for segment in answer(about))
    assert f"{'raise' if direction > 0 else 'lower'} the FID by 5.00 on average" in text
    assert "\u22120.88 to 10.88" in text


def test_a_pair_that_lost_its_half_parts_no_other() -> None:
    half = np.array([[True, False, False], [False, True, False], [True, True, False], [False, False, True]])
    pairs = np.stack([half[:3], ~half[:3]], axis=1).reshape(-1, 3)
    assert with_whole_pairs([2, 4, 6], pairs) == [2, 4, 6]
    assert with_whole_pairs([2, 4, 5], pairs[[0, 1, 2, 4, 5]]) == [2, 5]
    assert with_whole_pairs([2, 4, 5], pairs[[0, 2, 3, 4, 5]]) == [3, 5]


@FEW
@given(st.text(max_size=80))
def test_a_visible_name_has_only_characters_that_are_seen(name: str) -> None:
    shown = visible(name)
    assert shown and shown == shown.strip()
    for char in shown:
        assert char == " " or unicodedata.category(char)[0] not in "CZ" or char in "\u200c\u200d"
    assert visible(shown) == shown or "\\" in name or name.strip() == ""


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("", NO_NAME),
        (" \u00a0\t", NO_NAME),
        ("\u200d", NO_NAME),
        ("Ana  Maria\nLopez", "Ana Maria Lopez"),
        ("\u202eabc", "\\u202eabc"),
        ("a\x00b", "a\\x00b"),
        ("\ud800", "\\ud800"),
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"),
        ("\U0001f468\u200d\U0001f469", "\U0001f468\u200d\U0001f469"),
    ],
)
def test_names_that_would_not_be_seen_are_shown(name: str, shown: str) -> None:
    assert visible(name) == shown


@FEW
@given(st.lists(st.sampled_from(["", " ", "same", "x" * 500, "x" * 499, "x" * 47 + "yz", "\u5f20" * 30]), max_size=12))
def test_no_two_contributors_look_the_same(names: list[str]) -> None:
    found = labels(names)
    for texts in ([item.short for item in found], [item.in_chart for item in found], [item.full for item in found]):
        assert len(set(texts)) == len(names)
    assert all(len(item.short) <= MAX_SHOWN for item in found)
    assert all(len(item.in_chart) < 2.9 * MAX_EMS_IN_CHART for item in found)


def test_a_name_is_not_cut_within_a_character() -> None:
    assert shortened("abcde" + "f\u0301" + "gh" * 9, 7) == "abcde\u2026"
    assert shortened("abcd" + "\U0001f468\u200d\U0001f469" + "gh" * 9, 7) == "abcd\U0001f468\u2026"
    assert shortened("abcdefgh", 8) == "abcdefgh" and shortened("abcdefghi", 8) == "abcdefg\u2026"


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [
        (1234.5, 1, "1,234.5"),
        (-0.04, 1, "0.0"),
        (-0.06, 1, "\u22120.1"),
        (float("nan"), 2, "\u2013"),
        (None, 2, "\u2013"),
    ],
)
def test_numbers_have_their_decimals_and_a_true_minus(value: float | None, decimals: int, text: str) -> None:
    assert fixed(value, decimals) == text


def test_numbers_as_words() -> None:
    assert fixed(0.5, 1, signed=True) == "+0.5" and fixed(0.0, 1, signed=True) == "0.0"
    assert between((-1.0, 2.0), 1) == "\u22121.0 to 2.0" and between((np.nan, 1.0), 1) == "unknown"
    assert percent(0.1234) == "12.3\u202f%" and percent(float("nan")) == "\u2013"
    assert [significant(x) for x in (0.0012345, 12.345, 12345.6, 0.0)] == ["0.00123", "12.3", "12,346", "0"]
    assert [duration(x) for x in (0.5, 89, 90, 5399, 5400, 172800)] == [
        *("0.50 s", "89 s", "1.5 min", "90.0 min", "1.5 h", "2.0 days")
    ]
    assert decimals_for([1.0, 2.0], [0.05, 0.05]) == 3 and decimals_for([100.0], [30.0]) == 0
    assert decimals_for([]) == 1 and decimals_for([np.nan], [np.nan]) == 1
    assert listed("abc") == "a, b and c" and listed("a") == "a" and listed("abcdefg", 3) == "a, b and 5 others"


def test_sentences_keep_their_parts() -> None:
    sentence = say("{a} of {b}.", a=number("3", "rank"), b=names_in_words(labels("abcdefg")))
    assert "".join(part.text for part in sentence) == "3 of a, b, c and 4 others."
    assert [part.kind for part in sentence][:2] == ["number", "text"]
    assert "".join(part.text for part in names_in_words(labels("ab"))) == "a and b"


@FEW
@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_and_within_the_axis(low: float, size: float) -> None:
    axis = Axis.over([low, low + size], 0.0, 100.0)
    ticks = axis.ticks(4)
    assert 2 <= len(ticks) <= 8
    assert all(-0.01 <= axis(value) <= 100.01 for value, _ in ticks)
    if size > 1e-3 * abs(low):
        shown = [float(text.replace("\u2212", "-").replace(",", "")) for _, text in ticks]
        np.testing.assert_allclose(shown, [value for value, _ in ticks], rtol=1e-9, atol=1e-9 * size)


@FEW
@given(st.lists(st.floats(0, 200), min_size=1, max_size=6))
def test_labels_do_not_overlap(wanted: list[float]) -> None:
    placed = dict(charts._spread(wanted, 15.0, 0.0, 200.0))
    found = sorted(placed.values())
    assert len(found) == len(wanted)
    assert all(b - a >= 15.0 - 1e-9 for a, b in pairwise(found))
    assert found[-1] <= 200.0 + 1e-9


def test_whiskers_share_one_axis_and_unknown_intervals_have_none() -> None:
    axis, rows = charts.whiskers(
        np.array([1.0, -1.0, 0.5]), np.array([[0.5, 1.5], [-2.0, 0.0], [np.nan, np.nan]]), direction=-1
    )
    assert len({row.zero for row in rows}) == 1 and len({row.width for row in rows} | {axis.width}) == 1
    assert [row.css for row in rows] == ["bad", "good", "bad"]
    assert rows[2].low is None and rows[2].high is None
    assert float(rows[0].low or 0) < float(rows[0].value) < float(rows[0].high or 0)
    scale = (float(rows[0].value) - float(rows[0].zero)) / 1.0
    assert float(rows[1].value) == pytest.approx(float(rows[1].zero) - scale, abs=0.2)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 24, 601, 1000])
@pytest.mark.parametrize("paired", [True, False])
def test_prefixes_grow_to_all_and_keep_pairs(n: int, paired: bool) -> None:
    sizes = prefix_sizes(n, paired=paired)
    assert sizes[-1] == n and sizes == sorted(set(sizes)) and len(sizes) <= 6
    assert all(size % 2 == 0 for size in sizes[:-1]) or not paired


def test_behaviors_have_words_people_use() -> None:
    assert behavior_words("fid")[0] == "FID"
    assert behavior_words("inception_score_10@inception")[0] == "Inception Score, 10 splits, seen by inception"
    assert behavior_words("aesthetic_score_p90")[0] == "Aesthetic score, percentile 90"
    assert behavior_words("my.module:function") == ("my.module:function", "")


def test_the_glossary_is_whole() -> None:
    for key, term in GLOSSARY.items():
        assert key == term.key and re.fullmatch(r"[a-z0-9-]+", key)
        assert term.definition.endswith((".", "?")) and len(term.short) <= 80 and term.name
    used = "".join(path.read_text(encoding="utf-8") for path in TEMPLATES.glob("*.j2"))
    assert set(re.findall(r'm\.term\("([\w-]+)"', used)) | set(re.findall(r'm\.num\([^)]*"([\w-]+)"\)', used)) <= set(
        GLOSSARY
    )


def colors(block: str) -> dict[str, str]:
    """Colors of the style sheet's variables."""
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))


def luminance(color: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    channels = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(first: str, second: str) -> float:
    """Contrast ratio (WCAG 2.2), 1 to 21."""
    light, dark = sorted([luminance(first), luminance(second)], reverse=True)
    return (light + 0.05) / (dark + 0.05)


def themes() -> dict[str, dict[str, str]]:
    """Colors in light, dark and on paper."""
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    light, dark, paper = (colors(block) for block in blocks)
    return {"light": light, "dark": light | dark, "paper": light | paper}


@pytest.mark.parametrize("theme", ["light", "dark", "paper"])
def test_colors_have_the_contrast_that_wcag_asks_for(theme: str) -> None:
    found = themes()[theme]
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for text in ("ink", "muted", "accent", "bad"):
        for ground in ("bg", "panel"):
            assert contrast(found[text], found[ground]) >= 4.5, (text, ground)
    assert contrast(found["notice-ink"], found["notice"]) >= 4.5
    # Marks and lines that carry meaning: 3 to 1.
    for mark in ("s0", "s1", "s2", "s3", "s4", "axis", "accent", "bad", "ink"):
        assert contrast(found[mark], found["bg"]) >= 3, mark
    assert contrast(found["ink"], found["band"]) >= 3 and contrast(found["accent"], found["band"]) >= 3


def test_dark_is_dark_and_paper_is_white() -> None:
    found = themes()
    assert luminance(found["dark"]["bg"]) < 0.02 and found["paper"]["bg"] == found["light"]["bg"] == "#ffffff"
    assert set(found["dark"]) == set(found["light"])


def test_no_template_marks_text_as_safe() -> None:
    for path in TEMPLATES.glob("*.j2"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\|\s*safe|autoescape|Markup", text), path.name
        assert " style=" not in text and not re.search(r"\son\w+=", text), path.name
