"""A budget shared by credit: exact sums, a case by hand, and the policies for credit that is negative or unsure."""

from __future__ import annotations

import csv
import math
from decimal import Decimal
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tribute.errors import ConfigError, FitError
from tribute.report.payout import POLICIES, NegativePolicy, Payout, money, pay_out, payout_csv, smallest_unit
from tribute.study.outputs import shares
from tribute.types import Attributions

ALL: tuple[NegativePolicy, ...] = ("zero", "pool", "signed")
Z = 1.959963984540054


def credit(values: Any, errors: Any = 0.0, covariance: Any = None) -> Attributions:
    values = np.asarray(values, dtype=np.float64)
    if covariance is None:
        covariance = np.diag(np.broadcast_to(np.square(np.asarray(errors, dtype=np.float64)), values.shape))
    return Attributions(values, covariance, "shapley", "gp", "analytic", 10, len(values), 0.0)


def paid(values: Any, errors: Any = 0.0, *, budget: Any = "100", higher: bool = True, **changes: Any) -> Payout:
    asked: dict[str, Any] = {"currency": "EUR", "behavior_name": "fid"} | changes
    return pay_out(credit(values, errors), higher_is_better=higher, budget=budget, **asked)


def texts(payout: Payout) -> list[str]:
    return [str(amount) for amount in payout.amounts]


def test_no_amount_is_minus_nothing() -> None:
    """The interval of somebody who owes a tenth of a cent."""
    payout = paid([1.0, -1e-5], 1e-6, negative="signed")
    assert "-0.00" not in payout_csv([payout], ["a", "b"], [1, 1])


@pytest.mark.parametrize("scale", [1e-14, 1.0, 1e9])
def test_shares_are_unknown_where_credit_cancels_whatever_its_unit(scale: float) -> None:
    assert np.isnan(shares(credit(scale * np.array([0.1, 0.2, -0.3])))).all()
    np.testing.assert_allclose(shares(credit(scale * np.array([1.0, 3.0]))), [0.25, 0.75])


# By hand


def test_a_case_by_hand_under_every_policy() -> None:
    """Credit 6, 3, 1, -1, -2 with standard errors such that the third and fourth may be zero; they sum to 7."""
    values, errors = [6.0, 3.0, 1.0, -1.0, -2.0], [1.0, 1.0, 2.0, 2.0, 0.5]
    # 100 * (6, 3, 1) / 10
    assert texts(paid(values, errors)) == ["60.00", "30.00", "10.00", "0.00", "0.00"]
    # 100 * (6, 3, 1, -1, -2) / 7 = 85.714, 42.857, 14.285, -14.286, -28.572: the remainders of a cent are
    # 0.43, 0.71, 0.57, 0.43 and 0.86, three cents are left, and they go to .86, .71 and .57
    assert texts(paid(values, errors, negative="signed")) == ["85.71", "42.86", "14.29", "-14.29", "-28.57"]
    # the pool of 1 and -1 sums to 0: 100 * (6, 3) / 9
    assert texts(paid(values, errors, negative="pool")) == ["66.67", "33.33", "0.00", "0.00", "0.00"]
    # and with 2 and -1 it sums to 1, half of it each: 100 * (6, 3, 0.5, 0.5) / 10
    pooled = paid([6.0, 3.0, 2.0, -1.0, -2.0], errors, negative="pool")
    assert texts(pooled) == ["60.00", "30.00", "5.00", "5.00", "0.00"]
    assert pooled.includes_zero.tolist() == [False, False, True, True, False]
    np.testing.assert_allclose(pooled.shares, [0.6, 0.3, 0.05, 0.05, 0])


def test_where_lower_is_better_negative_attributions_are_good_credit() -> None:
    for negative in ALL:
        up = paid([6.0, 3.0, 1.0, -1.0], [1.0, 1.0, 0.1, 3.0], negative=negative)
        down = paid([-6.0, -3.0, -1.0, 1.0], [1.0, 1.0, 0.1, 3.0], negative=negative, higher=False)
        assert up.amounts == down.amounts
        np.testing.assert_allclose(up.intervals, down.intervals)
        assert down.values.tolist() == [-6.0, -3.0, -1.0, 1.0]


def test_equal_remainders_go_to_those_who_come_first() -> None:
    assert texts(paid([1.0, 1.0, 1.0])) == ["33.34", "33.33", "33.33"]
    assert texts(paid([1.0] * 3, budget="0.02")) == ["0.01", "0.01", "0.00"]


def test_one_contributor_gets_everything() -> None:
    for negative in ALL:
        assert texts(paid([2.5], 0.1, negative=negative)) == ["100.00"]


@pytest.mark.parametrize(
    ("currency", "budget", "expected"),
    [
        ("EUR", "10", ["3.34", "3.33", "3.33"]),
        ("jpy", "10", ["4", "3", "3"]),
        ("KWD", "10", ["3.334", "3.333", "3.333"]),
        ("CLF", "10", ["3.3334", "3.3333", "3.3333"]),
        ("XTS", "1E+1", ["3.34", "3.33", "3.33"]),
    ],
)
def test_the_smallest_unit_is_that_of_the_currency(currency: str, budget: str, expected: list[str]) -> None:
    found = paid([1.0, 1.0, 1.0], budget=budget, currency=currency)
    assert texts(found) == expected
    assert found.currency == currency.upper()
    assert found.unit == smallest_unit(currency)
    assert found.budget == 10


def test_intervals_of_the_amounts() -> None:
    """By hand: the sum that is divided by is held fixed, and nothing leaves what the policy can pay."""
    half = 100 * Z / 7
    signed = paid([6.0, 3.0, -2.0], [1.0, 2.0, 0.5], negative="signed")
    expected = [[600 / 7 - half, 600 / 7 + half], [300 / 7 - 2 * half, 300 / 7 + 2 * half]]
    expected.append([-200 / 7 - half / 2, -200 / 7 + half / 2])
    np.testing.assert_allclose(signed.intervals, expected)
    zero = paid([6.0, 3.0, -2.0], [1.0, 2.0, 0.5])
    np.testing.assert_allclose(zero.intervals[0], [100 * (6 - Z) / 9, 100 * (6 + Z) / 9])
    np.testing.assert_allclose(zero.intervals[1], [0, 100 * (3 + 2 * Z) / 9])
    np.testing.assert_allclose(zero.intervals[2], [0, 0])
    # Within the pool the amount is its mean, and the interval that of the mean: errors of 3 that nearly cancel.
    covariance = np.array([[0.01, 0.0, 0.0], [0.0, 9.0, -8.75], [0.0, -8.75, 9.0]])
    pool = pay_out(
        credit([6.0, 3.0, 1.0], covariance=covariance),
        higher_is_better=True,
        budget="100",
        currency="EUR",
        behavior_name="fid",
        negative="pool",
    )
    half_width = Z * math.sqrt(0.5) / 2
    np.testing.assert_allclose(pool.intervals[1], [10 * (2 - half_width), 10 * (2 + half_width)])
    np.testing.assert_allclose(pool.intervals[2], pool.intervals[1])
    assert texts(pool) == ["60.00", "20.00", "20.00"]


def test_what_is_said_beside_the_amounts() -> None:
    values, errors = [6.0, 3.0, 1.0, -1.0, -2.0], [1.0, 1.0, 2.0, 2.0, 0.5]
    notes = " ".join(paid(values, errors).notes)
    assert "2 of 5 contributors have a 95 % interval that includes zero; together they are paid 10.00 EUR" in notes
    assert "2 of 5 contributors have a negative estimate and are paid nothing" in notes
    assert "by a factor of 0.700" in notes  # 7 of 10
    assert "largest remainder" in notes
    notes = " ".join(paid(values, errors, negative="signed").notes)
    assert "together owe 42.86 EUR; the others are paid 142.86 EUR" in notes
    notes = " ".join(paid([1.0, 0.5], 1.0, negative="pool").notes)
    assert "everybody is paid the same" in notes
    assert "not shown that the contributors together" in notes
    notes = " ".join(paid([6.0, 1.0, -2.0], [1.0, 4.0, 4.0], negative="pool").notes)
    assert "is not above zero: they are paid nothing" in notes
    assert "nearly cancel" in " ".join(paid([1.0, -0.9], 0.01, negative="signed").notes)
    assert all("nearly cancel" not in note for note in paid([1.0, -0.5], 0.01).notes)
    unknown = paid([1.0, 2.0], float("nan"))
    assert "Intervals are not known" in unknown.notes[0]
    assert unknown.includes_zero.all()
    assert np.isnan(unknown.intervals).all()
    for negative in ALL:
        assert paid(values, errors, negative=negative).policy == POLICIES[negative]


# What cannot be shared


@pytest.mark.parametrize("budget", ["0", "-5", "NaN", "Infinity", "much", "", "10.005", "1e-7", "1E-999999", "1e30"])
def test_a_budget_that_cannot_be_shared(budget: str) -> None:
    with pytest.raises(ConfigError, match=r"budget: expected a positive amount in EUR, in whole units of 0\.01"):
        paid([1.0], budget=budget)


def test_a_budget_in_float_has_lost_its_cents() -> None:
    with pytest.raises(ConfigError, match=r"as text or Decimal; found the float 0\.1"):
        paid([1.0], budget=0.1)


@pytest.mark.parametrize("currency", ["", "€", "EURO", "=1+", "\u0395UR"])
def test_a_currency_is_three_letters(currency: str) -> None:
    with pytest.raises(ConfigError, match="currency: expected three letters"):
        paid([1.0], currency=currency)


def test_an_unknown_policy() -> None:
    with pytest.raises(ConfigError, match="negative: expected one of zero, pool, signed; found 'nothing'"):
        paid([1.0], negative="nothing")


@pytest.mark.parametrize("negative", ALL)
@pytest.mark.parametrize("values", [[-1.0, -2.0], [1.0, -2.0], [0.0, 0.0], [1.0, -1.0], [0.1 + 0.2, -0.3]])
def test_where_all_together_made_it_no_better_nothing_is_shared(values: list[float], negative: NegativePolicy) -> None:
    with pytest.raises(FitError, match=r"fid: all contributors together made it no better .* Choose another behavior"):
        paid(values, 0.1, negative=negative)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_credit_that_is_not_finite(bad: float) -> None:
    with pytest.raises(FitError, match="found 1 of 2 that are not"):
        paid([1.0, bad])


def test_a_pool_needs_intervals() -> None:
    with pytest.raises(FitError, match="intervals are not known"):
        paid([1.0, 2.0], float("nan"), negative="pool")


# Laws

numbers = st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 3))
budgets = st.integers(1, 10**25).map(lambda n: Decimal(n).scaleb(-2))
games = st.lists(st.tuples(numbers, st.floats(0, 100)), min_size=1, max_size=40).filter(
    lambda game: sum(v for v, _ in game) > 1e-3 * sum(abs(v) for v, _ in game)
)


@settings(deadline=None, max_examples=150)
@given(games, budgets, st.sampled_from(ALL))
def test_laws(game: list[tuple[float, float]], budget: Decimal, negative: NegativePolicy) -> None:
    values, errors = (np.array(column) for column in zip(*game, strict=True))
    found = paid(values, errors, budget=budget, negative=negative)
    cents = [int(amount * 100) for amount in found.amounts]
    assert sum(cents) == int(budget * 100)  # to the cent, whatever its size
    assert math.isclose(found.shares.sum(), 1.0, abs_tol=1e-6)
    by_share = np.argsort(found.shares, kind="stable")
    for below, above in pairwise(by_share):
        if found.shares[below] < found.shares[above]:
            assert cents[below] <= cents[above]
        elif values[below] == values[above] or negative == "pool":
            assert abs(cents[below] - cents[above]) <= max(1, 1e-15 * abs(cents[below]))
    if negative != "signed":
        assert min(cents) >= 0
    exact_size = float(budget) * np.abs(found.shares).max()
    off = np.abs(np.array(cents, dtype=np.float64) / 100 - found.shares * float(budget))
    assert (off <= 0.01 + 1e-12 * exact_size).all()  # quota: rounded up or down, never by more than a cent
    known = np.isfinite(found.intervals).all(axis=1)
    assert (found.intervals[known, 0] <= found.intervals[known, 1]).all()


@settings(deadline=None, max_examples=60)
@given(games, st.sampled_from(ALL), st.randoms(use_true_random=False))
def test_order_and_scale_do_not_matter(game: Any, negative: NegativePolicy, random: Any) -> None:
    """But for ties of the remainder, which are told by the order: here there are as many cents as make them rare."""
    values, errors = (np.array(column) for column in zip(*game, strict=True))
    budget = Decimal("1000003.07")
    found = paid(values, errors, budget=budget, negative=negative)
    order = list(range(len(values)))
    random.shuffle(order)
    moved = paid(values[order], errors[order], budget=budget, negative=negative)
    assert all(
        abs(found.amounts[i] - amount) <= Decimal("0.01") for i, amount in zip(order, moved.amounts, strict=True)
    )
    assert sorted(found.amounts) == sorted(moved.amounts)
    assert paid(values * 4, errors * 4, budget=budget, negative=negative).amounts == found.amounts


def test_a_budget_that_no_float_holds_is_shared_to_the_cent() -> None:
    budget = Decimal("123456789012345678901234567.89")
    found = paid(np.random.default_rng(0).normal(1.0, 0.4, 300), 0.1, budget=budget)
    cents = [int(str(amount).replace(".", "")) for amount in found.amounts]
    assert sum(cents) == 12345678901234567890123456789
    assert len(set(cents)) > 290
    assert money(found.budget, "EUR") == "123,456,789,012,345,678,901,234,567.89 EUR"


# The table


def test_the_table_is_exact_and_safe_in_a_spreadsheet() -> None:
    names = ("=HYPERLINK(1)", " +1", "\n@x", "\uff1d1", 'Ann "A", Bo', "", "-")
    values, errors = [6.0, 3.0, 2.0, 1.0, 0.5, -1.0, -2.0], [1.0, 1.0, 3.0, 0.1, 0.1, 2.0, 0.5]
    payouts = [paid(values, errors, negative=negative) for negative in ALL]
    rows = list(csv.DictReader(payout_csv(payouts, names, [3] * 7).splitlines(keepends=True)))
    assert len(rows) == 21
    assert [row["contributor"] for row in rows[:7]] == [f"'{n}" for n in names[:4]] + ['Ann "A", Bo', "", "'-"]
    for number, payout in enumerate(payouts):
        chosen = rows[7 * number : 7 * number + 7]
        assert [Decimal(row["amount"]) for row in chosen] == list(payout.amounts)
        assert sum(Decimal(row["amount"]) for row in chosen) == 100
        assert {row["negative"] for row in chosen} == {ALL[number]}
        assert {row["currency"] for row in chosen} == {"EUR"}
        assert [row["includes_zero"] for row in chosen] == ["no", "no", "yes", "no", "no", "yes", "no"]
        for row, low_high in zip(chosen, payout.intervals, strict=True):
            assert [float(row["low_95"]), float(row["high_95"])] == pytest.approx(low_high.tolist(), abs=0.0051)
    assert 'low_95": ""' not in str(rows)
    blank = payout_csv([paid([1.0, 2.0], float("nan"))], ["a", "b"], [1, 1])
    assert blank.splitlines()[1] == "fid,zero,a,1,1,yes,0.33333333,33.33,,,EUR"
