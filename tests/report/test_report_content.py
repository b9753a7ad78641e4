"""What a report says: the numbers of the study, in their order, in words that are true."""

from __future__ import annotations

import base64
import hashlib
import re
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from reading import Element, rows_of, texts
from written_report import HOSTILE_NAMES, Written, make_report

from benchmarks.synthetic_study import SyntheticBehavior, two_behaviors, write_synthetic_study
from tribute.errors import ConfigError
from tribute.report.glossary import GLOSSARY
from tribute.report.names import NO_NAME
from tribute.report.page import PayoutRequest
from tribute.study.outputs import credit_order, rank_texts, shares


def ranked_table(report: Written, place: int) -> Element:
    return report.document.by_id(f"behavior-{place + 1}-table")


def answers(report: Written) -> list[str]:
    return [item.text for item in report.document.by_id("answer").with_class("p", "lead")]


def test_the_parts_stand_in_their_order(plain: Written) -> None:
    found = [section.attributes["id"] for section in plain.document.all("section")]
    assert found == [
        *("answer", "behavior-1", "behavior-2", "proof", "convergence", "pro-rata", "cost", "method", "payout"),
        "glossary",
    ]
    (contents,) = plain.document.with_class("nav", "contents")
    assert [link.attributes["href"] for link in contents.all("a")] == [f"#{key}" for key in found]


@pytest.mark.parametrize("place", [0, 1])
def test_the_ranked_table_holds_the_attributions_of_the_study(plain: Written, place: int) -> None:
    item = plain.result().behaviors[place]
    fitted, order = item.attributions["shapley"], credit_order(item)
    rows = rows_of(ranked_table(plain, place))
    names = [f"contributor {i + 1}" for i in order]
    assert [row.all("th")[0].text for row in rows] == names
    cells = [[cell for cell in row.all("td") if "num" in cell.attributes["class"]] for row in rows]
    values = np.array([[float(cell.attributes["data-value"]) for cell in row] for row in cells])
    np.testing.assert_array_equal(values[:, 0], np.arange(1, 13))
    np.testing.assert_allclose(values[:, 1], fitted.values[order], rtol=1e-12)
    np.testing.assert_allclose(values[:, 2], 1.959964 * fitted.standard_errors[order], rtol=1e-6)
    np.testing.assert_array_equal(values[:, 3], np.array(plain.result().n_examples)[order])
    np.testing.assert_allclose(values[:, 4], shares(fitted)[order], rtol=1e-12)
    ranks = rank_texts(fitted, higher_is_better=place == 0)
    assert [row[5].text.replace("\u2013", "-") for row in cells] == [ranks[i] for i in order]
    for row, i in zip(cells, order, strict=True):
        shown = float(row[1].text.replace("\u2212", "-"))
        assert abs(shown - fitted.values[i]) <= 0.051 * fitted.standard_errors.max() * 2


def behavior(credit: npt.ArrayLike, **options: Any) -> SyntheticBehavior:
    return SyntheticBehavior(
        "fid" if options.get("higher_is_better") is False else "recall", np.asarray(credit), **options
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("higher", [True, False])
def test_a_clear_leader_is_named_with_direction_size_and_certainty(tmp_path: Path, higher: bool) -> None:
    sign = 1 if higher else -1
    credit = sign * np.array([0.2, 3.0, 0.3, 0.1, 0.2, 0.4])
    asked = behavior(credit, noise=0.02, curvature=0.0, higher_is_better=higher, v_empty=10.0)
    study = write_synthetic_study(tmp_path, [asked], n_fit=40, n_test=0)
    (answer,) = answers(make_report(study))
    found = re.fullmatch(
        r"contributor 2 contributes most: their [\d,]+ examples (raise|lower) the (Recall|FID) by ([\d.]+) on average "
        r"\(95 % interval ([\d.]+) to ([\d.]+), no unit\), which is ([\d.]+).% of what all contributors add together; "
        r"this lead is certain at the 95 % level\.",
        answer,
    )
    assert found, answer
    assert found[1] == ("raise" if higher else "lower")
    assert float(found[4]) <= float(found[3]) <= float(found[5])
    assert float(found[3]) == pytest.approx(3.0, abs=0.15)
    assert float(found[6]) == pytest.approx(100 * 3.0 / 4.2, abs=3)


def test_an_uncertain_leader_has_rivals_that_are_named(tmp_path: Path) -> None:
    study = write_synthetic_study(tmp_path, [behavior([1.0, 1.02, 0.1, 0.1, 0.1, 0.1], noise=0.3)], n_test=0)
    (answer,) = answers(make_report(study))
    first, second = (
        ("contributor 1", "contributor 2") if answer.startswith("contributor 1") else ("contributor 2", "contributor 1")
    )
    assert answer.startswith(f"{first} has the largest estimate: their ")
    assert answer.endswith(f"this lead is not certain, {second} may be ahead.")


def test_noise_alone_gives_nobody_credit(tmp_path: Path) -> None:
    silent = SyntheticBehavior("recall", np.full(6, 1e-3), noise=100.0, curvature=0.0)
    report = make_report(write_synthetic_study(tmp_path, [silent], n_fit=24, n_test=8))
    (answer,) = answers(report)
    assert answer.startswith("Nobody\u2019s credit can be told from zero yet; the largest estimate is that of")
    assert "contributes most" not in report.document.text
    assert "The proof fails" in report.document.by_id("answer").text
    assert "Shares mean little here" in report.document.by_id("answer").text


def test_harmful_contributors_are_named_and_drawn_as_such(tmp_path: Path) -> None:
    study = write_synthetic_study(tmp_path, [behavior([1.0, -0.8, 0.5, 0.4, 0.3, 0.3], noise=0.02)], n_test=0)
    report = make_report(study)
    assert "contributor 2 makes it worse" in report.document.by_id("answer").text
    last = rows_of(ranked_table(report, 0))[-1]
    assert last.all("th")[0].text == "contributor 2"
    assert "bad" in last.all("circle")[0].attributes["class"]


def test_the_neighbours_that_cannot_be_told_apart_are_listed(plain: Written) -> None:
    credit = plain.page.behaviors[0].credit
    assert credit is not None
    n_apart = sum(row.are_apart for row in credit.neighbors)
    section = plain.document.by_id("behavior-1")
    assert f"{n_apart} of 11 pairs of neighbours in the ranking can be told apart" in section.text
    in_runs = sum(int(last) - int(first) for first, last in re.findall(r"Ranks (\d+) to (\d+):", section.text))
    assert in_runs == 11 - n_apart, "every pair that is not told apart is within a run"
    assert "judged by itself at the 95 % level: among many such statements, about one in twenty" in section.text
    assert "What would separate them:" in section.text and "+-" not in section.text


def test_the_proof_has_lds_interval_and_ceiling_of_every_kernel(plain: Written) -> None:
    item = plain.result().behaviors[0]
    proof = plain.document.by_id("proof")
    table = next(table for table in proof.all("table") if "LDS for Inception Score" in table.all("caption")[0].text)
    found = {row.all("th")[0].text: texts(row) for row in rows_of(table)}
    assert len(found) == len(item.validations) == 4
    score = item.validations["shapley"].score
    low, high = 100 * score.interval
    assert found["Shapley (this report)"][3:5] == [f"{100 * score.mean:.1f}", f"{low:.1f} to {high:.1f}"]
    ceiling = item.validations["shapley"].ceiling
    assert ceiling is not None
    assert f"predicts them with {100 * ceiling.value:.0f} (" in proof.text


def test_convergence_ends_with_the_credit_of_the_report(plain: Written) -> None:
    fitted = plain.result().behaviors[0].attributions["shapley"]
    credit = plain.page.behaviors[0].credit
    assert credit is not None and credit.convergence is not None
    sizes = [row.n_coalitions for row in credit.convergence.rows]
    assert sizes == sorted(set(sizes)) and sizes[-1] == fitted.n_coalitions and len(sizes) >= 4
    assert all(size % 2 == 0 for size in sizes), "pairs are kept together"
    for label, text in zip(credit.convergence.shown, credit.convergence.rows[-1].estimates, strict=True):
        i = int(label.short.split()[1]) - 1
        assert float(text.replace("\u2212", "-")) == pytest.approx(fitted.values[i], abs=0.006)


def test_shares_by_examples_stand_beside_those_by_credit(plain: Written) -> None:
    n_examples = np.array(plain.result().n_examples)
    (table, _) = plain.document.by_id("pro-rata").all("table")
    rows = [[cell.attributes.get("data-value") for cell in row.all("td")] for row in rows_of(table)]
    by_credit, by_examples, difference = np.array([[float(row[k] or 0) for k in (1, 2, 3)] for row in rows]).T
    assert by_credit.sum() == pytest.approx(1) and by_examples.sum() == pytest.approx(1)
    np.testing.assert_allclose(difference, by_credit - by_examples, atol=1e-12)
    np.testing.assert_allclose(np.sort(by_examples), np.sort(n_examples / n_examples.sum()), rtol=1e-12)
    gains = plain.document.by_id("pro-rata").text
    best = rows_of(table)[int(np.argmax(difference))].all("th")[0].text
    assert f"Those who gain most by credit: {best} (" in gains


def test_amounts_sum_to_the_budget(plain: Written, hostile: Written) -> None:
    for report, budget in ((plain, "10000.00"), (hostile, "100.01")):
        for table in report.document.by_id("payout").all("table"):
            amounts = [row.with_class("td", "amount")[0].text for row in rows_of(table)]
            plain_text = [Decimal(text.replace(",", "").replace("\u2212", "-")) for text in amounts]
            assert sum(plain_text) == Decimal(budget)
            assert Decimal(table.all("tfoot")[0].with_class("td", "amount")[0].text.split()[0].replace(",", "")) == sum(
                plain_text
            )


def test_a_payout_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    worse = SyntheticBehavior("recall", np.full(6, -1.0), 10.0, noise=0.05)
    study = write_synthetic_study(tmp_path, [worse], n_fit=24, n_test=0)
    report = make_report(study, payout=PayoutRequest("100"))
    assert "made it no better" in report.document.by_id("payout").text
    assert report.document.by_id("payout").all("table") == []
    (answer,) = answers(report)
    assert answer.startswith("Nobody makes the Recall better")
    # Shares of harm would have put those who harmed most first.
    assert "all together made the behavior no better" in report.document.by_id("pro-rata").text
    assert "gain most" not in report.document.by_id("pro-rata").text
    with pytest.raises(ConfigError, match="budget"):
        make_report(study, payout=PayoutRequest("-3"))
    with pytest.raises(ConfigError, match="expected behaviors of the study"):
        make_report(study, behavior_names=("fid",))


def test_the_cost_is_that_of_the_store(plain: Written) -> None:
    rows = {row.all("th")[0].text: texts(row) for row in rows_of(plain.document.by_id("cost").all("table")[0])}
    assert rows["Fit coalitions"][1] == "48 models" and rows["Fit coalitions"][2] == "4.8 s"
    assert rows["Fit coalitions"][3] == "3.8 min"  # 48 * 4.75 s
    assert rows["Test coalitions, retrained"][1] == "32 models"
    assert rows["Training the full model"][1:4] == ["1,000 steps", "\u2013", "7.0 min"]
    method = plain.document.by_id("method").text
    assert "trained for 500 more steps. It has 40 % of the full model\u2019s parameters." in method
    assert "recognises 97.0 % of images" in method


def test_an_unfinished_study_says_so_in_its_first_lines(hostile: Written, plain: Written) -> None:
    head = hostile.document.with_class("header", "top")[0].text
    assert "This study is not finished. 76 of 104 planned measurements are finished, 2 failed." in head
    table = hostile.document.by_id("answer").all("table")[0]
    assert texts(rows_of(table)[-1]) == ["Test coalitions, retrained", "12", "40", "2"]
    assert "the loss became NaN" in hostile.document.by_id("answer").text
    assert "not finished" not in plain.document.text


@pytest.mark.parametrize("n_finished", [0, 3])
def test_a_study_that_has_just_begun_gives_a_report_without_credit(tmp_path: Path, n_finished: int) -> None:
    study = write_synthetic_study(tmp_path, two_behaviors(6), n_fit=24, n_finished=n_finished)
    report = make_report(study, payout=PayoutRequest("100"))
    found = [section.attributes["id"] for section in report.document.all("section")]
    assert found == ["answer", "proof", "cost", "method", "payout", "glossary"]
    assert "There is no credit for FID yet" in report.document.by_id("answer").text
    assert f"{n_finished} of 52 planned measurements are finished" in report.document.text


def test_only_the_behaviors_asked_for_are_shown(plain: Written) -> None:
    report = make_report(plain.study, behavior_names=("fid",))
    assert len(report.page.behaviors) == 1 and "Inception Score" not in report.document.text
    assert [section.attributes["id"] for section in report.document.all("section")][1] == "behavior-1"


def test_hostile_names_are_text_and_nothing_else(hostile: Written, plain: Written) -> None:
    allowed = {item.tag for item in plain.document.walk()}
    assert {item.tag for item in hostile.document.walk()} <= allowed | {"ul", "li"}
    for element in hostile.document.walk():
        assert not [name for name in element.attributes if name.startswith("on") or name in ("style", "srcdoc")]
    assert len(hostile.document.all("script")) == 1
    cells = [row.all("th")[0] for row in rows_of(ranked_table(hostile, 0))]
    shown = [cell.text for cell in cells]
    assert HOSTILE_NAMES[0] in shown and HOSTILE_NAMES[1] in shown and HOSTILE_NAMES[10] in shown
    assert "&lt;b&gt; &amp;" in shown and "49" not in shown
    assert sum(name.startswith(NO_NAME) for name in shown) == 2 and len(set(shown)) == len(shown)
    assert "\\u202eevil\\u202c" in shown and "nul\\x00 bell\\x07 escape\\x1b[31m" in shown
    assert {"same #13", "same #14"} <= set(shown)
    (long,) = [cell for cell in cells if "xxx" in cell.text]
    assert long.all("summary")[0].text == "x" * 47 + "\u2026"
    assert long.all("details")[0].all("bdi")[1].text == "x" * 500
    for char in hostile.html:
        assert ord(char) >= 32 or char == "\n", f"control character {ord(char)}"
        assert char not in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067", "a direction of writing that a name chose"
    isolates = [hostile.html.count(char) for char in "\u2068\u2069"]
    assert isolates[0] == isolates[1]


def test_three_hundred_contributors_fit_in_five_megabytes(large: Written) -> None:
    assert len(large.html.encode()) < 5e6
    assert len(rows_of(ranked_table(large, 0))) == 300
    charts = large.document.with_class("svg", "chart")
    assert max(float(chart.attributes["height"]) for chart in charts) < 1200
    assert "260 contributors in the middle are in the table above only" in large.document.text


@pytest.mark.parametrize("name", ["plain", "hostile", "large"])
class TestForm:
    """What holds for every report."""

    @pytest.fixture
    def report(self, name: str, request: pytest.FixtureRequest) -> Written:
        return request.getfixturevalue(name)

    def test_it_loads_nothing(self, report: Written) -> None:
        for element in report.document.walk():
            for attribute in ("src", "href", "srcset", "action", "poster", "data", "xlink:href"):
                value = element.attributes.get(attribute)
                assert value is None or value.startswith(("#", "data:image/png;base64,")), f"{element.tag} {value}"
            assert element.tag not in ("link", "iframe", "object", "embed", "base", "form")
        style = report.document.all("style")[0].text
        assert "url(" not in style and "@import" not in style

    def test_the_policy_names_style_and_script_by_their_hashes(self, report: Written) -> None:
        (meta,) = report.document.all("meta", lambda m: m.attributes.get("http-equiv") == "Content-Security-Policy")
        policy = dict(part.strip().split(" ", 1) for part in meta.attributes["content"].split(";"))
        for tag, directive in (("style", "style-src"), ("script", "script-src")):
            text = "".join(str(child) for child in report.document.all(tag)[0].children)
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert policy[directive] == f"'sha256-{digest}'"
        assert policy["default-src"] == "'none'" and policy["img-src"] == "data:"

    def test_ids_are_unique_and_links_lead_somewhere(self, report: Written) -> None:
        ids = [item.attributes["id"] for item in report.document.walk() if "id" in item.attributes]
        assert len(ids) == len(set(ids))
        for link in report.document.all("a"):
            assert link.attributes["href"].removeprefix("#") in ids
        for item in report.document.walk():
            for name in ("aria-labelledby", "aria-describedby"):
                assert set(item.attributes.get(name, "").split()) <= set(ids)

    def test_headings_are_in_order(self, report: Written) -> None:
        levels = [int(item.tag[1]) for item in report.document.walk() if re.fullmatch("h[1-6]", item.tag)]
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))

    def test_tables_have_captions_and_heads_with_scope(self, report: Written) -> None:
        for table in report.document.all("table"):
            assert table.all("caption")[0].text
            assert {head.attributes["scope"] for head in table.all("th")} == {"col", "row"}
            n_columns = len(table.all("thead")[0].all("th"))
            assert {len(list(row)) for row in rows_of(table)} == {n_columns}

    def test_every_chart_has_words(self, report: Written) -> None:
        for chart in report.document.all("svg"):
            if chart.attributes.get("aria-hidden") == "true":
                assert chart.attributes["focusable"] == "false"  # its numbers are in the cells beside it
                continue
            assert chart.attributes["role"] == "img"
            assert chart.all("title")[0].text and len(chart.all("desc")[0].text) > 20
            assert chart in [item for figure in report.document.all("figure") for item in figure.walk()]
        for figure in report.document.all("figure"):
            assert figure.all("figcaption")[0].text

    def test_charts_stay_within_their_frames(self, report: Written) -> None:
        for chart in report.document.with_class("svg", "chart"):
            _, _, width, height = (float(x) for x in chart.attributes["viewbox"].split())
            for shape in chart.walk():
                for names, limit in ((("x", "x1", "x2", "cx"), width), (("y", "y1", "y2", "cy"), height)):
                    for coordinate in (float(shape.attributes[name]) for name in names if name in shape.attributes):
                        assert 0 <= coordinate <= limit, (chart.attributes["aria-labelledby"], shape)
                assert "nan" not in " ".join(shape.attributes.values()).split()

    def test_every_number_of_a_table_is_explained_on_hover_and_in_the_glossary(self, report: Written) -> None:
        for table in report.document.all("table"):
            if table.all("caption")[0].text in ("What is measured so far", "Device time by stage"):
                continue
            for row in rows_of(table):
                for cell in row.with_class("td", "num"):
                    assert cell.attributes.get("title"), f"{table.all('caption')[0].text}: {cell.text}"
        for link in report.document.with_class("a", "term") + report.document.with_class("a", "what"):
            key = link.attributes["href"].removeprefix("#term-")
            assert link.attributes["title"] == GLOSSARY[key].definition
        entries = report.document.by_id("glossary").all("div")
        assert all(item.all("dfn")[0].text and item.all("dd")[0].text for item in entries)

    def test_it_is_the_same_when_made_again(self, report: Written) -> None:
        from tribute.report.render import render

        assert render(report.page) == report.html
