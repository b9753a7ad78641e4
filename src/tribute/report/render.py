"""From what a report says to one HTML file, which loads nothing and runs one script of its own."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tribute import __version__
from tribute.report.behavior_page import BehaviorPage
from tribute.report.glossary import GLOSSARY
from tribute.report.page import ReportPage

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading of its own."""

    key: str
    title: str
    template: str
    behavior: BehaviorPage | None = None


def render(page: ReportPage) -> str:
    """The page as HTML. Everything but the style sheet and the script is escaped."""
    style, script = _read("report.css"), _read("report.js")
    policy = "; ".join(
        [
            "default-src 'none'",
            "img-src data:",
            f"style-src '{_hash(style)}'",
            f"script-src '{_hash(script)}'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            page=page,
            sections=sections(page),
            policy=policy,
            # The only text that is not escaped: two files of this package.
            style=Markup(style),
            script=Markup(script),
            version=__version__,
        )
    )


def sections(page: ReportPage) -> list[Section]:
    """The parts of the page in their order; those without content are left out."""
    several = len(page.behaviors) > 1
    found = [Section("answer", "The question and the answer", "answer.html.j2")]
    for behavior in page.behaviors:
        if behavior.credit is not None:
            title = f"Credit for {behavior.title}" if several else "Credit, and how sure it is"
            found.append(Section(behavior.key, title, "credit.html.j2", behavior))
    found.append(Section("proof", "The proof", "proof.html.j2"))
    if page.pictures:
        found.append(Section("pictures", "Generated images", "pictures.html.j2"))
    if page.has_credit:
        found.append(Section("convergence", "Convergence", "convergence.html.j2"))
        found.append(Section("pro-rata", "Beside the status quo", "pro_rata.html.j2"))
    found.append(Section("cost", "What it cost", "cost.html.j2"))
    found.append(Section("method", "Method, limits, provenance", "method.html.j2"))
    if page.payouts:
        found.append(Section("payout", "Payout", "payout.html.j2"))
    found.append(Section("glossary", "Glossary", "glossary.html.j2"))
    return found


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=False,
    )
    environment.globals["GLOSSARY"] = GLOSSARY
    environment.filters["thousands"] = lambda n: f"{n:,}"
    return environment


def _read(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a Content-Security-Policy names a style sheet or a script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
