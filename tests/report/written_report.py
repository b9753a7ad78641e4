"""Reports as tests look at them, and names that attack them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from reading import Element, read_html

from tribute.config import StudyConfig
from tribute.report.page import PayoutRequest, ReportPage, gather_page
from tribute.report.render import render
from tribute.store.records import Store
from tribute.study.record import StudyRecord
from tribute.study.results import StudyResult, read_result

HOSTILE_NAMES = (
    "<script>window.hacked = 1</script>",
    '<img src=x onerror="window.hacked = 2">',
    '"><svg onload=window.hacked=3>',
    "</title></style></script><script>window.hacked = 4</script>",
    "x" * 500,
    "\u0634\u0631\u06a9\u0629 \u0627\u0644\u0641\u0646",
    "\u202eevil\u202c",
    "",
    "  \t\n ",
    "nul\x00 bell\x07 escape\x1b[31m",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt; &amp;",
    "same",
    "same",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 family",
    "\u2069\u2066isolates",
    "' onmouseover='window.hacked = 5",
    "\u200b",
)
WRITTEN = 1_800_000_000.0


@dataclass(frozen=True)
class Written:
    """A report with the study that it is about.

    Attributes:
        study: Path of the settings.
        config: The settings.
        page: What the report says.
        html: The file.
        document: The file as it was parsed.
    """

    study: Path
    config: StudyConfig
    page: ReportPage
    html: str
    document: Element

    def result(self) -> StudyResult:
        """What the study found, read in the ordinary way."""
        with Store.open(self.config.db_url, create=False) as store:
            return read_result(self.config, StudyRecord.read(self.config), store)


def make_report(study: Path, *, payout: PayoutRequest | None = None, behavior_names: tuple[str, ...] = ()) -> Written:
    """The report of a study."""
    config = StudyConfig.from_yaml(study)
    record = StudyRecord.read(config)
    with Store.open(config.db_url, create=False) as store:
        page = gather_page(config, record, store, behavior_names=behavior_names, payout=payout, written=WRITTEN)
    html = render(page)
    return Written(study, config, page, html, read_html(html))
