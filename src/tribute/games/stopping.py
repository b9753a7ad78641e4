"""When to stop measuring coalitions: looks along the way, and a rule that keeps the intervals honest.

Stopping as soon as intervals look narrow favours moments at which they are too narrow by chance. The rule therefore
begins to look at three coalitions per contributor, where the model's hyper-parameters are no longer prior opinion, and
asks two looks in a row. Coverage at the time of stopping is measured in `benchmarks/stopping.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tribute.errors import ConfigError
from tribute.types import Attributions

LOOKS_IN_A_ROW = 2
COALITIONS_BEFORE_FIRST_LOOK = 3
"""Per contributor."""


def looks(n_contributors: int, n_most: int) -> Iterator[int]:
    """Numbers of coalitions after which to look: 3 n, then every n / 2, whole pairs; `n_most` is the last.

    Args:
        n_contributors: n, at least 2.
        n_most: Most coalitions that may be measured.
    """
    step = max(2, 2 * round(n_contributors / 4))
    n_coalitions = 2 * -(-COALITIONS_BEFORE_FIRST_LOOK * n_contributors // 2)
    while n_coalitions < n_most:
        yield n_coalitions
        n_coalitions += step
    yield n_most


def share_half_width(attributions: Attributions, level: float = 0.95) -> float:
    """Half the width of the widest interval over |v(grand) - v(empty)|; infinite where one is unknown or 0."""
    total = abs(float(attributions.values.sum()))
    low, high = attributions.intervals(level).T
    widest = float(np.max(high - low)) / 2.0
    return widest / total if total > 0.0 and np.isfinite(widest) else np.inf


def narrow_enough(history: Sequence[Attributions], half_width: float, level: float = 0.95) -> bool:
    """Whether the intervals of the last looks are all narrow enough to stop.

    Args:
        history: Attributions of every look so far, in order.
        half_width: Wanted half-width of the widest interval, as a share of |v(grand) - v(empty)|.
        level: Of the intervals.

    Raises:
        ConfigError: `half_width` is not positive.
    """
    if not half_width > 0.0:
        raise ConfigError(
            f"Expected a positive half-width of the intervals, found {half_width}. "
            "0.02 asks for shares known to plus or minus 2 percentage points."
        )
    last = history[-LOOKS_IN_A_ROW:]
    return len(last) == LOOKS_IN_A_ROW and all(share_half_width(item, level) <= half_width for item in last)
