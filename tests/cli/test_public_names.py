"""The public names exist, are complete, and cost nothing until used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import tribute


def test_every_public_name_is_found_at_its_home() -> None:
    assert set(tribute._HOME_OF) == set(tribute.__all__)
    for name in tribute.__all__:
        assert getattr(tribute, name).__module__ == tribute._HOME_OF[name]
    assert set(tribute.__all__) <= set(dir(tribute))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'pay'"):
        tribute.pay  # noqa: B018


def test_importing_the_package_loads_nothing_heavy() -> None:
    script = "import sys, tribute; assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
