"""A store on either database, and what the tests put into it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.store.content import open_study
from tribute.store.records import Store


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """An empty store, once in a file and once on a server."""
    is_file = request.param == "sqlite"
    with Store.open(tmp_path / "results.db" if is_file else request.getfixturevalue("postgres_url")) as store:
        yield store


@pytest.fixture
def study_id(store: Store) -> int:
    return open_study(store)
