"""`tribute report STUDY.yaml`: one HTML page with the credit, its uncertainty, its proof, and what it would pay."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import Field

from tribute.cli.arguments import Arguments, parse, read_study
from tribute.cli.console import print_line
from tribute.errors import ConfigError, StoreError
from tribute.files import write_whole

FILE_NAME = "report.html"
PAYOUT_NAME = "payout.csv"
"""Beside the report, where there is a budget."""


class ReportArguments(Arguments):
    """Flags of `tribute report`."""

    study: Annotated[Path, tyro.conf.Positional] = Field(
        description="The study's settings, a YAML file, or its run folder."
    )
    outdir: Path | None = Field(default=None, description="Folder of run folders; None: the study's.")
    behavior: tuple[str, ...] = Field(default=(), description="Only these behaviors; by default all of the study.")
    out: Path | None = Field(default=None, description="File to write; None: report.html in the run folder.")
    budget: str | None = Field(default=None, description="Amount to be shared by credit, e.g. 10000; None: no payout.")
    currency: str | None = Field(default=None, description="With --budget: three letters; None: EUR.")
    negative: Literal["zero", "pool", "signed"] | None = Field(
        default=None, description="With --budget: what negative credit is paid; None: zero."
    )


def run(argv: Sequence[str], prog: str) -> None:
    """Parse the flags, write the page."""
    arguments = parse(ReportArguments, argv, prog=prog, description="Write the report of a study, at any moment.")
    from tribute.report.page import PayoutRequest, gather_page
    from tribute.report.payout import payout_csv
    from tribute.report.render import render
    from tribute.store.records import Store
    from tribute.study.record import StudyRecord

    config = read_study(arguments.study, arguments.outdir)
    payout = None
    if arguments.budget is not None:
        payout = PayoutRequest(arguments.budget, arguments.currency or "EUR", arguments.negative or "zero")
    elif arguments.currency is not None or arguments.negative is not None:
        raise ConfigError("--currency, --negative: expected --budget beside them, e.g. --budget 10000; found none")
    record = StudyRecord.read(config)
    with Store.open(config.db_url, create=False) as store:
        page = gather_page(config, record, store, behavior_names=arguments.behavior, payout=payout)
    path = arguments.out or config.run_dir / FILE_NAME
    files = {path: render(page)}
    payouts = [item.payout for item in page.payouts if item.payout is not None]
    if payouts:
        files[path.with_name(PAYOUT_NAME)] = payout_csv(payouts, record.contributor_names, record.n_examples)
    for path, content in files.items():
        try:
            write_whole(path, content)
        except OSError as error:
            raise StoreError(f"{path} could not be written ({error}); make room, or set another --out") from error
        print_line(f"wrote {path}")
    if not page.progress.is_complete:
        print_line(f"the study is not finished: {page.progress.sentence}")
