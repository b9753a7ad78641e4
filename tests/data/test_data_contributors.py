"""Contributor tables and the planted vendors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from tribute.data.contributors import (
    PLANTED_VENDORS,
    VENDOR_SIZES,
    ContributorTable,
    VendorExamples,
    contributors_by_class,
    vendors,
)
from tribute.data.sources import load_training_data
from tribute.data.tensors import array_sha256
from tribute.errors import CoalitionError, DataError
from tribute.seeding import numpy_stream


def table(n_contributors: int, n_examples: int) -> ContributorTable:
    """Random owners, everyone at least once."""
    extra = numpy_stream(0, "test.owners", n_contributors, n_examples).integers(
        0, n_contributors, n_examples - n_contributors
    )
    owners = np.concatenate([np.arange(n_contributors), extra])
    return ContributorTable(tuple(f"c{i}" for i in range(n_contributors)), owners.astype(np.int32))


@given(st.lists(st.booleans(), min_size=5, max_size=5).filter(any))
def test_a_coalition_and_its_examples_determine_each_other(present: list[bool]) -> None:
    owners = table(5, 40)
    mask = np.array(present)
    rows = owners.examples_of(mask)
    expected = [i for i, owner in enumerate(owners.contributor_of_example) if present[owner]]
    assert rows.tolist() == expected and rows.dtype == np.int64
    assert owners.coalition_of(rows).tolist() == present
    assert len(rows) == owners.n_examples[mask].sum()


def test_the_contributors_divide_the_examples_without_rest_or_overlap() -> None:
    owners = table(7, 100)
    rows = [owners.examples_of(single) for single in np.eye(7, dtype=bool)]
    assert sorted(np.concatenate(rows).tolist()) == list(range(100))
    assert owners.n_examples.tolist() == [len(r) for r in rows]
    assert owners.coalition_of([]).tolist() == [False] * 7


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros(5, dtype=bool), "at least one contributor"),
        (np.ones(4, dtype=bool), r"shape \(5,\).*shape \(4,\)"),
        (np.ones((1, 5), dtype=bool), r"shape \(1, 5\)"),
        (np.ones(5), "boolean mask.*float64"),
        (np.arange(5), "boolean mask.*int64"),
    ],
)
def test_a_mask_that_is_no_coalition_is_refused(mask: np.ndarray, message: str) -> None:
    with pytest.raises(CoalitionError, match=message):
        table(5, 40).examples_of(mask)


@pytest.mark.parametrize("rows", [[40], [-1], [0.5], np.ones(40, dtype=bool)])
def test_rows_that_are_no_examples_are_refused(rows: object) -> None:
    with pytest.raises(CoalitionError, match="expected integers 0 to 39"):
        table(5, 40).coalition_of(rows)  # type: ignore[arg-type]


def test_the_fingerprint_follows_names_and_owners_and_nothing_else() -> None:
    owners = table(3, 10)
    same = ContributorTable(owners.names, owners.contributor_of_example.copy())
    renamed = ContributorTable(("a", "b", "c"), owners.contributor_of_example)
    moved = ContributorTable(owners.names, np.roll(owners.contributor_of_example, 1))
    glued = ContributorTable(("a", "b,c"), np.array([0, 1], np.int32))
    split = ContributorTable(("a,b", "c"), np.array([0, 1], np.int32))
    assert owners.fingerprint == same.fingerprint
    assert len({t.fingerprint for t in (owners, renamed, moved, glued, split)}) == 5


def test_a_table_cannot_be_changed_afterwards() -> None:
    given_owners = np.array([0, 1, 1], dtype=np.int32)
    owners = ContributorTable(("a", "b"), given_owners)
    given_owners[:] = 0
    assert owners.n_examples.tolist() == [1, 2]
    with pytest.raises(ValueError, match="read-only"):
        owners.contributor_of_example[0] = 1


@pytest.mark.parametrize(
    ("names", "owners", "message"),
    [
        (("a", "a"), [0, 1], "unique names"),
        (("a", "b"), [0, 2], "indices 0 to 1, found 0 to 2"),
        (("a", "b"), [-1, 1], "found -1 to 1"),
        (("a", "b"), [0, 0], r"found none for \['b'\]"),
        (("a",), [0.0], "one integer per example"),
        ((), [], "dtype float64"),
    ],
)
def test_an_inconsistent_table_is_refused(names: tuple[str, ...], owners: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ContributorTable(names, np.array(owners))  # type: ignore[arg-type]


def test_names_are_looked_up_and_unknown_ones_answered_with_the_known() -> None:
    owners = table(3, 10)
    assert [owners.idx_of(name) for name in owners.names] == [0, 1, 2]
    with pytest.raises(DataError, match=r"'d' is unknown.*c0, c1, c2"):
        owners.idx_of("d")


def test_classes_that_do_not_occur_get_no_contributor() -> None:
    owners = contributors_by_class(np.array([3, 1, 3, 3]), ["ant", "bee", "cow", "dog"])
    assert owners.names == ("bee", "dog")
    assert owners.contributor_of_example.tolist() == [1, 0, 1, 1]
    with pytest.raises(DataError, match="expected 0 to 1 for 2 class names, found 1 to 3"):
        contributors_by_class(np.array([3, 1]), ["ant", "bee"])


@pytest.fixture(scope="module")
def planted() -> VendorExamples:
    digits = load_training_data("digits")
    return vendors(digits.images, digits.labels)


def owned_by(planted: VendorExamples, *names: str) -> np.ndarray:
    """Rows of the vendors called so."""
    owners = planted.contributors
    return owners.examples_of(np.isin(owners.names, names))


def test_the_vendors_are_the_ones_that_were_published(planted: VendorExamples) -> None:
    # A change here changes every result on vendors; NumPy does not promise to keep its streams.
    assert planted.contributors.fingerprint == "73cafb9139e3c4432f14aaf9fca6a11cc9d628b267055b3735be71ee9ed38381"
    assert array_sha256(planted.images) == "5a99a64d63625752f806e241c7e6e333f92b41b8ace07aeed4318040088de1a7"


def test_eleven_vendors_partition_the_scans_in_the_documented_sizes(planted: VendorExamples) -> None:
    sizes = dict(zip(planted.contributors.names, planted.contributors.n_examples.tolist(), strict=True))
    assert sizes == VENDOR_SIZES
    assert min(sizes.values()) >= 60 and len(set(sizes.values())) == 12
    partition = owned_by(planted, *(set(VENDOR_SIZES) - {PLANTED_VENDORS.copier}))
    assert planted.scan_of_example[partition].tolist() == list(range(1797))


def test_the_class_mixes_differ(planted: VendorExamples) -> None:
    counts = np.zeros((12, 10))
    np.add.at(counts, (planted.contributors.contributor_of_example, planted.labels), 1)
    expected = np.outer(counts.sum(axis=1), counts.sum(axis=0)) / counts.sum()
    assert ((counts - expected) ** 2 / expected).sum() > chi2(df=11 * 9).ppf(1 - 1e-6)


def test_every_copy_is_an_image_that_the_copied_vendor_owns_too(planted: VendorExamples) -> None:
    copies, originals = owned_by(planted, PLANTED_VENDORS.copier), owned_by(planted, PLANTED_VENDORS.copied)
    copied_scans = planted.scan_of_example[copies]
    assert len(set(copied_scans.tolist())) == len(copies) < len(originals)
    assert set(copied_scans.tolist()) <= set(planted.scan_of_example[originals].tolist())
    assert np.array_equal(planted.images[copies], planted.images[copied_scans])
    assert np.array_equal(planted.labels[copies], planted.labels[copied_scans])


def test_noise_of_the_stated_size_is_in_all_scans_of_the_noisy_vendors_and_in_no_other(
    planted: VendorExamples,
) -> None:
    clean = load_training_data("digits").images[planted.scan_of_example]
    altered = np.flatnonzero((planted.images != clean).any(axis=(1, 2, 3)))
    noisy = owned_by(planted, *PLANTED_VENDORS.noisy)
    assert altered.tolist() == noisy.tolist()
    # From the middle of the scale, clipping leaves the median of the absolute noise as it is: 0.6745 sd.
    middle = np.abs(clean[noisy] / 127.5 - 1.0) < 0.15
    deviation = (planted.images[noisy].astype(float) - clean[noisy])[middle] / 127.5
    assert np.median(np.abs(deviation)) / 0.6745 == pytest.approx(PLANTED_VENDORS.noise_sd, rel=0.05)
    assert deviation.mean() == pytest.approx(0.0, abs=0.04)
    # One scan by itself: its noise depends on no other.
    row = int(noisy[7])
    noise = numpy_stream(PLANTED_VENDORS.seed, "data.vendors.noise", row).standard_normal((8, 8, 1))
    alone = np.clip(clean[row] / 127.5 - 1.0 + PLANTED_VENDORS.noise_sd * noise, -1.0, 1.0)
    assert np.abs((alone + 1.0) * 127.5 - planted.images[row]).max() <= 0.5


def test_vendors_of_anything_but_the_digits_are_refused() -> None:
    with pytest.raises(DataError, match="all 1797 digits, found 10 images"):
        vendors(np.zeros((10, 8, 8, 1), dtype=np.uint8), np.zeros(10, dtype=np.int64))
