"""A budget shared among contributors by their credit, exactly, by a policy that is stated.

Amounts are whole numbers of the smallest unit of the currency and sum to the budget. Between the estimate, a float, and
the amount, a decimal, stands exact rational arithmetic: no budget is too large to be shared to the cent.

Whether credit should become money, and by which policy, is for people to decide; `docs/outputs.md` gives the reasons
for and against each policy.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from tribute.errors import ConfigError, FitError, printable
from tribute.study.outputs import spreadsheet_text
from tribute.types import Attributions

NegativePolicy = Literal["zero", "pool", "signed"]

POLICIES: dict[NegativePolicy, str] = {
    "zero": (
        "Negative credit is paid nothing; the others share the budget in proportion to their estimated credit, also "
        "those whose 95 % interval includes zero."
    ),
    "pool": (
        "Credit that the 95 % interval places above zero is paid in proportion to the estimate; those whose interval "
        "includes zero cannot be told apart, and share their summed credit, if it is above zero, in equal parts; an "
        "interval below zero is paid nothing."
    ),
    "signed": (
        "Everybody's amount is the budget times credit divided by the sum of all credit: negative credit owes money, "
        "and the amounts, those owed included, sum to the budget."
    ),
}
"""Each policy for negative credit, and for credit that may be zero, in one sentence."""

ROUNDING = (
    "Amounts are rounded to the smallest unit of the currency by largest remainder, so that they sum to the budget; "
    "equal remainders go to the contributor who comes first."
)

CENTS = -2
"""Exponent of the smallest unit of a currency that is not listed below: a hundredth."""

_EXPONENTS = {
    **dict.fromkeys(["BIF", "CLP", "DJF", "GNF", "ISK", "JPY", "KMF", "KRW", "PYG", "RWF"], 0),
    **dict.fromkeys(["UGX", "UYI", "VND", "VUV", "XAF", "XOF", "XPF"], 0),
    **dict.fromkeys(["BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"], -3),
    **dict.fromkeys(["CLF", "UYW"], -4),
}
"""Exponents of the smallest unit where it is not a hundredth (ISO 4217, list one)."""

MAX_DIGITS = 30
"""Of a budget before the decimal point: more is a slip of the keyboard."""

NORMAL_95 = 1.959963984540054
"""Half the width of a 95 % interval, in standard errors, as in `Attributions.intervals`."""

CANCELLING = 0.2
"""Below this ratio of the sum of credit to the sum of its absolute values, the notes say that credit nearly cancels."""

_NEGLIGIBLE = 1e-9
"""A sum of credit this small beside the credit that it is the sum of is rounding, not credit."""


@dataclass(frozen=True)
class Payout:
    """What each contributor is paid for one behavior.

    Attributes:
        behavior_name: The behavior that is paid for.
        currency: Three letters.
        budget: What is shared, with as many decimals as the currency has.
        negative: The policy for negative credit.
        unit: Smallest unit of the currency, e.g. 0.01.
        values: `(n_contributors,)` attributions, raw, in the unit of the behavior.
        shares: `(n_contributors,)` fractions of the budget before rounding, whose sum is 1; negative only if `signed`.
        amounts: `(n_contributors,)`; they sum to the budget exactly.
        intervals: `(n_contributors, 2)` 95 % intervals of the amounts before rounding, with the sum that is divided by
            held fixed; NaN where the attribution's interval is not known.
        includes_zero: `(n_contributors,)` bool; True where the attribution's 95 % interval includes zero, or is not
            known.
        policy: The policy in one sentence.
        notes: What else one must know to judge the amounts, in sentences.
    """

    behavior_name: str
    currency: str
    budget: Decimal
    negative: NegativePolicy
    unit: Decimal
    values: npt.NDArray[np.float64] = field(repr=False)
    shares: npt.NDArray[np.float64] = field(repr=False)
    amounts: tuple[Decimal, ...] = field(repr=False)
    intervals: npt.NDArray[np.float64] = field(repr=False)
    includes_zero: npt.NDArray[np.bool_] = field(repr=False)
    policy: str
    notes: tuple[str, ...]


def pay_out(
    attributions: Attributions,
    *,
    higher_is_better: bool,
    budget: Decimal | str | int,
    currency: str,
    behavior_name: str,
    negative: NegativePolicy = "zero",
) -> Payout:
    """Share a budget among contributors by their credit for one behavior.

    Good credit moves the behavior in its direction: where lower is better, a negative attribution is good credit.

    Args:
        attributions: Of one behavior; Shapley values, whose sum is v(grand) - v(empty).
        higher_is_better: Direction of the behavior.
        budget: Positive, with at most as many decimals as the currency has.
        currency: Three letters of ISO 4217.
        behavior_name: For messages and tables.
        negative: Policy for negative credit; see `POLICIES`.

    Returns:
        Amounts whose sum is the budget, to the smallest unit of the currency.

    Raises:
        ConfigError: Budget, currency or policy is not one.
        FitError: The credit cannot be shared: it is not finite, all together made the behavior no better, or `pool`
            is asked for and the intervals are not known.

    References:
        Balinski and Young (2001), Fair Representation: the method of largest remainders (Hamilton).
    """
    if negative not in get_args(NegativePolicy):
        raise ConfigError(
            f"negative: expected one of {', '.join(get_args(NegativePolicy))}; found {printable(str(negative))!r}"
        )
    currency, exponent = _checked_currency(currency)
    n_units = _checked_budget(budget, currency, exponent)
    credit, relative = _checked_credit(attributions, higher_is_better, behavior_name)
    low, high = (attributions.intervals() * (1 if higher_is_better else -1)).T
    low, high = np.fmin(low, high), np.fmax(low, high)
    includes_zero = ~((low > 0) | (high < 0))

    weights, low, high = _weights(attributions, credit, low, high, includes_zero, negative, behavior_name)
    sum_of_weights = sum(weights, Fraction(0))  # positive, as the sum of all credit is
    amounts = _largest_remainder(n_units, [weight / sum_of_weights for weight in weights])
    size = np.abs(credit).max()
    scale = float(n_units * Fraction(10) ** exponent * Fraction(float(size)) / sum_of_weights)
    payout = Payout(
        behavior_name=behavior_name,
        currency=currency,
        budget=_exact(n_units, exponent),
        negative=negative,
        unit=_exact(1, exponent),
        values=attributions.values.copy(),
        shares=np.array([float(weight / sum_of_weights) for weight in weights]),
        amounts=tuple(_exact(amount, exponent) for amount in amounts),
        intervals=np.stack([low, high], axis=1) / size * scale,
        includes_zero=includes_zero,
        policy=POLICIES[negative],
        notes=(),
    )
    if negative != "signed":
        np.clip(payout.intervals, 0.0, float(payout.budget), out=payout.intervals)
    return replace(payout, notes=tuple(_notes(payout, attributions, credit, relative)))


def payout_csv(payouts: Sequence[Payout], contributor_names: Sequence[str], n_examples: Sequence[int]) -> str:
    """One row per payout and contributor; columns are described in `docs/outputs.md`.

    Args:
        payouts: Of the same contributors.
        contributor_names: `(n_contributors,)`, as they are; the table is safe to open in a spreadsheet.
        n_examples: `(n_contributors,)`.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["behavior", "negative", "contributor", "n_examples", "attribution", "includes_zero", "share"]
        + ["amount", "low_95", "high_95", "currency"]
    )
    for payout in payouts:
        n_decimals = max(0, -_exponent(payout.unit))
        for i, name in enumerate(contributor_names):
            bounds = [round(float(x), n_decimals) + 0.0 for x in payout.intervals[i]]  # + 0.0: no -0.00
            interval = ["" if not math.isfinite(x) else f"{x:.{n_decimals}f}" for x in bounds]
            writer.writerow(
                [spreadsheet_text(payout.behavior_name), payout.negative, spreadsheet_text(name), n_examples[i]]
                + [f"{payout.values[i]:.8g}", "yes" if payout.includes_zero[i] else "no", f"{payout.shares[i]:.8g}"]
                + [f"{payout.amounts[i]:f}", *interval, payout.currency]
            )
    return text.getvalue()


def smallest_unit(currency: str) -> Decimal:
    """Smallest unit of a currency: 0.01 for EUR and for codes that are not known, 1 for JPY, 0.001 for KWD.

    Raises:
        ConfigError: The currency is not three letters.
    """
    return _exact(1, _checked_currency(currency)[1])


def money(amount: Decimal, currency: str) -> str:
    """An amount for people: `1,234.50 EUR`."""
    return f"{amount:,f} {currency}"


def _exponent(unit: Decimal) -> int:
    exponent = unit.as_tuple().exponent
    assert isinstance(exponent, int)  # a unit is finite
    return exponent


def _exact(n_units: int, exponent: int) -> Decimal:
    """`n_units * 10 ** exponent`, free of the precision of Decimal's context, which arithmetic would round to."""
    return Decimal((int(n_units < 0), tuple(int(digit) for digit in str(abs(n_units))), exponent))


def _checked_currency(currency: str) -> tuple[str, int]:
    """The code in capitals, and the exponent of its smallest unit."""
    code = currency.strip().upper()
    if len(code) != 3 or not code.isascii() or not code.isalpha():
        raise ConfigError(f"currency: expected three letters, e.g. EUR, USD, JPY; found {printable(currency[:40])!r}")
    return code, _EXPONENTS.get(code, CENTS)


def _checked_budget(budget: Decimal | str | int, currency: str, exponent: int) -> int:
    """The budget in smallest units of its currency."""
    unit = _exact(1, exponent)
    expected = f"budget: expected a positive amount in {currency}, in whole units of {unit:f}"
    if isinstance(budget, float):  # the types say otherwise, but a float may have lost the cents already
        raise ConfigError(f"{expected}, as text or Decimal; found the float {budget!r}")
    try:
        amount = Decimal(budget.strip() if isinstance(budget, str) else budget)
    except (InvalidOperation, ValueError) as error:
        raise ConfigError(f"{expected}, e.g. 10000; found {printable(str(budget)[:40])!r}") from error
    if not amount.is_finite() or amount <= 0:
        raise ConfigError(f"{expected}, e.g. 10000; found {amount}")
    if amount.adjusted() >= MAX_DIGITS:
        raise ConfigError(f"{expected}, with at most {MAX_DIGITS} digits before the point; found {amount:.3e}")
    too_fine = f"{expected}; found {amount:.12g}, which is finer. Round the budget"
    if amount.adjusted() < exponent:
        raise ConfigError(too_fine)
    n_units = Fraction(amount) / Fraction(10) ** exponent
    if n_units.denominator != 1:
        raise ConfigError(too_fine)
    return n_units.numerator


def _checked_credit(
    attributions: Attributions, higher_is_better: bool, behavior_name: str
) -> tuple[npt.NDArray[np.float64], float]:
    """Credit `(n_contributors,)`, positive where it is good, and its sum, which is positive."""
    values = attributions.values
    if not len(values) or not np.isfinite(values).all():
        n_unknown = int((~np.isfinite(values)).sum())
        raise FitError(
            f"{behavior_name}: expected a finite attribution for every contributor; found {n_unknown} of {len(values)} "
            "that are not. Measure more coalitions, or choose another estimator, before money is shared"
        )
    credit = values if higher_is_better else -values
    exact = [Fraction(float(value)) for value in credit]
    total, size = sum(exact, Fraction(0)), sum(map(abs, exact), Fraction(0))
    if total <= Fraction(_NEGLIGIBLE) * size:
        better = "higher" if higher_is_better else "lower"
        found = float(total) * (1 if higher_is_better else -1)
        raise FitError(
            f"{behavior_name}: all contributors together made it no better ({better} is better; attributions sum to "
            f"{found:.3g}, for Shapley values v(grand) - v(empty)), so there is nothing to share. "
            "Choose another behavior, check its direction, or measure the end points again; a payment that does not "
            "depend on credit, e.g. pro rata by examples, remains possible"
        )
    return credit, float(total / size)


def _weights(
    attributions: Attributions,
    credit: npt.NDArray[np.float64],
    low: npt.NDArray[np.float64],
    high: npt.NDArray[np.float64],
    includes_zero: npt.NDArray[np.bool_],
    negative: NegativePolicy,
    behavior_name: str,
) -> tuple[list[Fraction], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """What each is paid in proportion to, and its 95 % interval, both in the unit of the behavior."""
    exact = [Fraction(float(value)) for value in credit]
    zero = Fraction(0)
    if negative == "signed":
        return exact, low, high
    if negative == "zero":
        return [max(weight, zero) for weight in exact], np.maximum(low, 0.0), np.maximum(high, 0.0)
    if not (np.isfinite(low) & np.isfinite(high)).all():
        raise FitError(
            f"{behavior_name}: the policy 'pool' asks whose 95 % interval includes zero, and intervals are not known; "
            "expected an estimator that gives them. Choose 'zero' or 'signed', or another estimator"
        )
    n_pooled = int(includes_zero.sum())
    if not n_pooled:
        return [max(weight, zero) for weight in exact], np.maximum(low, 0.0), np.maximum(high, 0.0)
    pooled = sum((weight for weight, is_in in zip(exact, includes_zero, strict=True) if is_in), zero)
    part = max(pooled, zero) / n_pooled
    # The parts are one number, the mean of the pool, with the interval of that mean.
    mean = pooled / n_pooled
    variance = float(attributions.covariance[np.ix_(includes_zero, includes_zero)].sum())
    half_width = NORMAL_95 * math.sqrt(max(variance, 0.0)) / n_pooled
    weights = [part if is_in else max(weight, zero) for weight, is_in in zip(exact, includes_zero, strict=True)]
    low = np.where(includes_zero, float(mean) - half_width, low)
    high = np.where(includes_zero, float(mean) + half_width, high)
    return weights, np.maximum(low, 0.0), np.maximum(high, 0.0)


def _largest_remainder(n_units: int, shares: Sequence[Fraction]) -> list[int]:
    """Whole numbers nearest below `n_units * shares`, with what is left given to the largest remainders.

    Args:
        n_units: What is shared.
        shares: `(n_contributors,)`, which sum to 1 exactly; they may be negative.
    """
    quotas = [n_units * share for share in shares]
    amounts = [math.floor(quota) for quota in quotas]
    n_left = n_units - sum(amounts)
    by_remainder = sorted(range(len(quotas)), key=lambda i: (amounts[i] - quotas[i], i))
    for i in by_remainder[:n_left]:
        amounts[i] += 1
    return amounts


def _notes(payout: Payout, attributions: Attributions, credit: npt.NDArray[np.float64], relative: float) -> list[str]:
    """What to know beside the amounts, in sentences."""
    n, unsure = len(payout.amounts), payout.includes_zero
    notes = []
    if not np.isfinite(attributions.covariance).all():
        notes.append("Intervals are not known, so it cannot be said how sure these amounts are.")
    elif unsure.any():
        resting = _sum(amount for amount, is_unsure in zip(payout.amounts, unsure, strict=True) if is_unsure)
        paid = "in equal parts" if payout.negative == "pool" else "by the estimate"
        notes.append(
            f"{int(unsure.sum())} of {n} contributors have a 95 % interval that includes zero; together they are paid "
            f"{money(resting, payout.currency)} {paid}."
        )
    n_negative = int((credit < 0).sum())
    if payout.negative == "zero" and n_negative:
        excess = float(-credit[credit < 0].sum() / credit.sum())
        notes.append(
            f"{n_negative} of {n} contributors have a negative estimate and are paid nothing; the shares of the others "
            f"are smaller than their credit divided by the sum of all credit, by a factor of {1 / (1 + excess):.3f}."
        )
    if payout.negative == "signed" and n_negative:
        owed = _sum(-amount for amount in payout.amounts if amount < 0)
        paid = _sum(amount for amount in payout.amounts if amount > 0)
        notes.append(
            f"{n_negative} of {n} contributors have a negative estimate and together owe "
            f"{money(owed, payout.currency)}; the others are paid {money(paid, payout.currency)}, more than the budget "
            "by what is owed."
        )
    if payout.negative == "pool" and unsure.all():
        notes.append("No interval lies above zero: everybody is paid the same.")
    elif payout.negative == "pool" and unsure.any() and credit[unsure].sum() <= 0:
        notes.append(
            "The summed credit of those whose interval includes zero is not above zero: they are paid nothing."
        )
    if relative < CANCELLING:
        notes.append(
            "Positive and negative credit nearly cancel, so shares are large beside what they are shares of: a small "
            "change of the estimates changes the amounts much."
        )
    variance = float(attributions.covariance.sum())
    if math.isfinite(variance) and NORMAL_95 * math.sqrt(max(variance, 0.0)) >= credit.sum():
        notes.append(
            "The 95 % interval of the sum of all credit includes zero: it is not shown that the contributors together "
            "made the behavior better at all."
        )
    return [*notes, ROUNDING]


def _sum(amounts: Iterable[Decimal]) -> Decimal:
    """The exact sum; Decimal's own rounds to the precision of its context."""
    found = list(amounts)
    exponent = _exponent(found[0]) if found else 0
    return _exact(sum(int(Fraction(amount) / Fraction(10) ** exponent) for amount in found), exponent)
