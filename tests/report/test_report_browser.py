"""A report in a real browser: Debian's Chromium, driven by Playwright. Nothing leaves the machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from written_report import HOSTILE_NAMES, Written

pytest.importorskip("playwright.sync_api", reason="playwright drives the browser: pip install tribute[dev]")
axe_runner = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core: pip install tribute[dev]")

from playwright.sync_api import Browser, Page, sync_playwright  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")

ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run"),
]
DESKTOP, TELEPHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield found
        found.close()


@dataclass
class Visit:
    """A page that was opened, with what the browser said of it."""

    page: Page
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def visit(browser: Browser, report: Written, folder: Path, **options: Any) -> Visit:
    """Open a report in a fresh context; a violation of its policy is a message of the console."""
    path = folder / "report.html"
    path.write_text(report.html, encoding="utf-8")
    options.setdefault("viewport", DESKTOP)
    page = browser.new_context(**options).new_page()
    found = Visit(page)
    page.on("console", lambda message: found.messages.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: found.messages.append(str(error)))
    page.on("request", lambda request: found.requests.append(request.url))
    page.goto(path.as_uri())
    return found


def column(page: Page, place: int, table: str = "behavior-1-table") -> list[str]:
    """Texts of one column of a table, in the order in which they are shown."""
    cells = page.locator(f"#{table} tbody tr > :nth-child({place})").all_inner_texts()
    return [" ".join(text.split()) for text in cells]


@pytest.mark.parametrize("name", ["small", "hostile"])
def test_the_browser_is_content_and_nothing_is_asked_of_anybody(
    browser: Browser, tmp_path: Path, name: str, request: pytest.FixtureRequest
) -> None:
    found = visit(browser, request.getfixturevalue(name), tmp_path)
    found.page.evaluate("document.querySelectorAll('button, summary').forEach((item) => item.click())")
    assert found.messages == []
    assert [url for url in found.requests if not url.startswith(("file:", "data:"))] == []
    assert found.page.evaluate("window.hacked") is None
    assert found.page.locator("script").count() == 1
    found.page.context.close()


def test_the_policy_stops_what_names_could_not(browser: Browser, tmp_path: Path, plain: Written) -> None:
    found = visit(browser, plain, tmp_path)
    found.page.evaluate(
        "() => { const script = document.createElement('script'); script.textContent = 'window.hacked = 1';"
        " document.body.append(script);"
        " const image = new Image(); image.src = 'https://example.invalid/x.png'; document.body.append(image); }"
    )
    assert found.page.evaluate("window.hacked") is None
    assert any("Content Security Policy" in message for message in found.messages)
    found.page.context.close()


def test_hostile_names_are_seen_as_they_are(browser: Browser, tmp_path: Path, hostile: Written) -> None:
    found = visit(browser, hostile, tmp_path)
    names = column(found.page, 2)
    for name in HOSTILE_NAMES[:4]:
        assert any(text.startswith(name[:46]) for text in names)
    long = found.page.locator("#behavior-1-table details.full", has_text="xxxx")
    assert not long.locator("> bdi").is_visible()
    long.locator("summary").focus()
    found.page.keyboard.press("Enter")
    assert long.locator("> bdi").is_visible() and long.locator("> bdi").inner_text() == "x" * 500
    assert found.page.evaluate("document.documentElement.scrollWidth") == DESKTOP["width"]
    found.page.context.close()


def test_a_click_and_a_key_sort_by_number_and_keep_ties_in_order(
    browser: Browser, tmp_path: Path, plain: Written
) -> None:
    found = visit(browser, plain, tmp_path)
    page = found.page
    ranked, examples = column(page, 2), [int(text) for text in column(page, 6)]
    head = page.locator("#behavior-1-table thead th").nth(5)
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert [int(text) for text in column(page, 6)] == sorted(examples, reverse=True)
    assert page.locator("#sorted").inner_text() == "Sorted by Examples, descending."
    page.keyboard.press("Enter")  # the button still has the focus
    assert head.get_attribute("aria-sort") == "ascending"
    assert [int(text) for text in column(page, 6)] == sorted(examples)
    assert page.locator("#behavior-1-table thead th[aria-sort]").count() == 1
    by_number = [name for _, name in sorted(zip(examples, ranked, strict=True), key=lambda pair: pair[0])]
    assert column(page, 2) == by_number
    page.locator("#behavior-1-table thead th").nth(0).locator("button").focus()
    page.keyboard.press("Space")
    assert column(page, 2) == ranked and column(page, 1) == [str(i + 1) for i in range(12)]
    ranks = page.locator("#behavior-1-table thead th").nth(7).locator("button")
    page.locator("#behavior-1-table thead th").nth(6).locator("button").click()  # another order to begin with
    page.keyboard.press("Enter")
    ranks.click()
    bounds = [
        (int(text.split("\u2013")[0]), ranked.index(name))
        for text, name in zip(column(page, 8), column(page, 2), strict=True)
    ]
    assert bounds == sorted(bounds), "equal rows stay in the order of their ranks"
    values = page.locator("#behavior-1-table thead th").nth(3).locator("button")
    values.click()
    shown = [float(text.replace("\u2212", "-")) for text in column(page, 4)]
    assert shown == sorted(shown, reverse=True), "negative numbers are numbers"
    page.locator("#behavior-1-table thead th").nth(1).locator("button").click()
    assert column(page, 2) == [f"contributor {i + 1}" for i in range(12)]
    assert found.messages == []
    page.context.close()


def test_the_keyboard_sees_where_it_is(browser: Browser, tmp_path: Path, plain: Written) -> None:
    found = visit(browser, plain, tmp_path)
    page = found.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the answer"
    assert page.locator(".skip").bounding_box()["x"] >= 0  # type: ignore[index]
    button = page.locator("#behavior-1-table thead button").first
    button.focus()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Tab")
    assert button.evaluate("item => getComputedStyle(item).outlineStyle") == "solid"
    assert float(button.evaluate("item => parseFloat(getComputedStyle(item).outlineWidth)")) >= 2
    link = page.locator("#behavior-1-table thead a.what").first
    link.focus()
    page.keyboard.press("Enter")
    assert page.url.endswith("#term-rank")
    assert page.locator("#term-rank").is_visible()
    page.context.close()


def test_all_is_there_without_javascript(browser: Browser, tmp_path: Path, plain: Written) -> None:
    found = visit(browser, plain, tmp_path, java_script_enabled=False)
    page = found.page
    assert page.locator("button").count() == 0
    assert column(page, 1) == [str(i + 1) for i in range(12)]
    for section in ("answer", "behavior-1", "proof", "convergence", "pro-rata", "cost", "method", "payout", "glossary"):
        assert page.locator(f"#{section}").is_visible()
    assert page.locator("svg.chart").first.is_visible()
    page.locator("#proof summary").first.click()
    assert page.locator("#proof details table").first.is_visible()
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, TELEPHONE], ids=["1280", "390"])
def test_axe_finds_no_serious_violation(
    browser: Browser, tmp_path: Path, small: Written, viewport: dict[str, int], scheme: str
) -> None:
    # axe is itself a script that the policy would stop.
    found = visit(browser, small, tmp_path, viewport=viewport, color_scheme=scheme, bypass_csp=True)
    found.page.evaluate("document.querySelectorAll('details').forEach((item) => { item.open = true; })")
    results = axe_runner.Axe().run(found.page).response
    serious = {
        item["id"]: [node["html"][:200] for node in item["nodes"]][:3]
        for item in results["violations"]
        if item["impact"] in ("serious", "critical")
    }
    assert serious == {}
    found.page.context.close()


@pytest.mark.parametrize("name", ["plain", "small"])
def test_a_telephone_shows_it_without_sideways_scrolling(
    browser: Browser, tmp_path: Path, name: str, request: pytest.FixtureRequest
) -> None:
    found = visit(browser, request.getfixturevalue(name), tmp_path, viewport=TELEPHONE, is_mobile=True, has_touch=True)
    page = found.page
    assert page.evaluate("document.documentElement.scrollWidth") == TELEPHONE["width"]
    too_wide = page.evaluate(
        "() => [...document.querySelectorAll('main *')].filter((item) => !item.closest('.scroll, svg, details')"
        " && item.getBoundingClientRect().right > innerWidth + 1).map((item) => item.outerHTML.slice(0, 80))"
    )
    assert too_wide == []
    table = page.locator("#behavior-1-table")
    assert table.bounding_box()["width"] <= TELEPHONE["width"]  # type: ignore[index]
    smallest = page.evaluate(
        "() => Math.min(...[...document.querySelectorAll('main *, header *')].filter((item) => item.childNodes.length"
        " && [...item.childNodes].some((node) => node.nodeType === 3 && node.data.trim())"
        " && item.checkVisibility()).map((item) => parseFloat(getComputedStyle(item).fontSize)))"
    )
    assert smallest >= 11
    page.context.close()


def test_paper_is_light_and_whole(browser: Browser, tmp_path: Path, large: Written) -> None:
    found = visit(browser, large, tmp_path, color_scheme="dark")
    page = found.page
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    boxes = page.evaluate(
        "() => [...document.querySelectorAll('.scroll')].filter((box) => box.checkVisibility())"
        ".filter((box) => box.scrollHeight > box.clientHeight + 1).map((box) => box.getAttribute('aria-label'))"
    )
    assert boxes == [], "nothing is hidden in a box that cannot be scrolled on paper"
    assert (
        page.locator("#behavior-1-table tbody tr").last.evaluate("row => getComputedStyle(row).breakInside") == "avoid"
    )
    assert page.locator("a.term").first.evaluate("a => getComputedStyle(a).textDecorationLine") == "underline"
    page.set_viewport_size({"width": 688, "height": 1000})  # 182 mm, between the margins of A4
    assert page.evaluate("document.documentElement.scrollWidth") <= 688
    row = page.locator("#behavior-1-table tbody tr").first
    assert row.evaluate("row => getComputedStyle(row).display") == "table-row", "no cards on paper"
    assert page.locator("#behavior-1-table thead").evaluate("head => getComputedStyle(head).display") == (
        "table-header-group"
    )
    pdf = page.pdf(prefer_css_page_size=True, print_background=True)
    assert pdf.startswith(b"%PDF") and pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") >= 10
    sizes = {part.split(b"]")[0] for part in pdf.split(b"/MediaBox [")[1:]}
    assert [round(float(x)) for x in sizes.pop().split()] == [0, 0, 595, 842] and not sizes
    page.context.close()
