"""Test evaluations by training seed: what some seed lacks is left out so that most is kept."""

from __future__ import annotations

import numpy as np
import pytest

from tribute.games.coalitions import all_coalitions
from tribute.study.attribution import split_by_seed

MASKS = all_coalitions(4)[1:9]


def measured(missing: set[tuple[int, int]], n_seeds: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value 100 * seed + coalition of every evaluation but the missing (seed, coalition)."""
    pairs = [(s, c) for s in range(n_seeds) for c in range(len(MASKS)) if (s, c) not in missing]
    seeds, coalitions = np.array(pairs).T
    return MASKS[coalitions], 100.0 * seeds + coalitions, seeds + 40


@pytest.mark.parametrize(
    ("missing", "seeds", "coalitions"),
    [
        (set(), [0, 1, 2], range(8)),
        ({(1, 3)}, [0, 1, 2], [0, 1, 2, 4, 5, 6, 7]),  # one that was set aside costs its coalition, not its seed
        ({(2, c) for c in range(2, 8)}, [0, 1], range(8)),  # the last seed has only begun
        ({(1, c) for c in range(1, 8)} | {(2, c) for c in range(8)}, [0], range(8)),
        ({(0, c) for c in range(1, 8)}, [1, 2], range(8)),
    ],
)
def test_the_most_evaluations_are_kept(missing: set[tuple[int, int]], seeds: list[int], coalitions: range) -> None:
    masks, behaviors = split_by_seed(*measured(missing))
    np.testing.assert_array_equal(masks, MASKS[list(coalitions)])
    np.testing.assert_array_equal(behaviors, [[100 * s + c for c in coalitions] for s in seeds])


def test_the_same_coalition_and_seed_twice_is_averaged() -> None:
    masks, values, seeds = measured(set(), n_seeds=1)
    kept, behaviors = split_by_seed(
        np.concatenate([masks, masks[:1]]), np.append(values, 4.0), np.append(seeds, seeds[0])
    )
    np.testing.assert_array_equal(kept, MASKS)
    assert behaviors[0, 0] == 2.0
