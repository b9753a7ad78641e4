from __future__ import annotations

import numpy as np
import pytest

from tribute.errors import CoalitionError, FitError
from tribute.games.coalitions import (
    all_coalitions,
    check_evaluations,
    coalition_key,
    coalition_keys,
    complement_clusters,
    complements,
    empty_coalition,
    grand_coalition,
    mask_from_idx,
    mask_from_key,
)


def test_key_is_the_documented_one():
    assert coalition_key(mask_from_idx([0, 4, 5, 6, 7, 8, 9], 10)) == "10:03f1"


@pytest.mark.parametrize("n", [1, 3, 7, 8, 9, 16, 17, 200])
def test_keys_name_one_coalition_each_and_read_back(n):
    masks = np.unique(np.random.default_rng(n).random((60, n)) < 0.5, axis=0)
    keys = coalition_keys(masks)
    assert len(set(keys)) == len(masks)
    assert keys == [coalition_key(mask) for mask in masks]
    for key, mask in zip(keys, masks, strict=True):
        np.testing.assert_array_equal(mask_from_key(key), mask)


def test_keys_tell_numbers_of_contributors_apart():
    assert coalition_key(empty_coalition(5)) != coalition_key(empty_coalition(6))


@pytest.mark.parametrize("key", ["", "10", "10:", "10:3f1", "10:03F1", "10:ffff", "10:0003f1", "0:00", "x:00"])
def test_key_that_names_nothing(key):
    with pytest.raises(CoalitionError, match="coalition key"):
        mask_from_key(key)


def test_all_coalitions_are_all_and_in_binary_order():
    masks = all_coalitions(4)
    assert len(np.unique(masks, axis=0)) == 16
    np.testing.assert_array_equal(masks @ (1 << np.arange(4)), np.arange(16))
    proper = all_coalitions(4, include_empty=False, include_grand=False)
    np.testing.assert_array_equal(proper, masks[1:-1])
    np.testing.assert_array_equal(complements(masks), masks[::-1])


def test_end_coalitions():
    assert not empty_coalition(3).any()
    assert grand_coalition(3).all()


def test_clusters_join_a_coalition_its_complement_and_its_repeats():
    masks = all_coalitions(5)
    clusters = complement_clusters(np.vstack([masks, masks]))
    np.testing.assert_array_equal(clusters[:32], clusters[32:])
    np.testing.assert_array_equal(clusters[:32], clusters[31::-1])
    assert len(np.unique(clusters)) == 16


@pytest.mark.parametrize("idx", [[3], [-1], [0, 0], [1.0], [True]])
def test_mask_from_bad_indices(idx):
    with pytest.raises(CoalitionError):
        mask_from_idx(idx, 3)


@pytest.mark.parametrize("masks", [np.ones((2, 3)), np.ones(3, bool), np.ones((0, 3), bool), np.ones((2, 0), bool)])
def test_masks_that_are_no_boolean_rows(masks):
    with pytest.raises(CoalitionError, match="Expected masks"):
        check_evaluations(masks, np.zeros(len(masks)))


def test_one_finite_behavior_per_coalition():
    masks = all_coalitions(2)
    with pytest.raises(FitError, match="one behavior per coalition"):
        check_evaluations(masks, np.zeros(3))
    with pytest.raises(FitError, match="at 1, 3"):
        check_evaluations(masks, np.array([0.0, np.nan, 1.0, np.inf]))


def test_too_many_or_no_contributors():
    with pytest.raises(CoalitionError, match="at most 20"):
        all_coalitions(21)
    for n in (0, -1, 2.0, True):
        with pytest.raises(CoalitionError, match="at least 1"):
            empty_coalition(n)  # pyright: ignore[reportArgumentType]
    with pytest.raises(CoalitionError, match="one mask"):
        coalition_key(all_coalitions(2))
