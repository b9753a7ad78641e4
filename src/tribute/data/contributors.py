"""Who owns which training example, and the examples that a coalition of contributors induces."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from tribute.errors import CoalitionError, DataError
from tribute.seeding import numpy_stream
from tribute.types import CoalitionMask, Images


@dataclass(frozen=True, eq=False)
class ContributorTable:
    """The owner of every training example: one for each example, and each contributor owns at least one.

    Attributes:
        names: Unique names `(n_contributors,)`; contributors choose them, so they are untrusted text.
        contributor_of_example: `(n_examples,)` int32; index into `names` of each example's owner. Read-only.

    Raises:
        DataError: Names repeat, an owner is out of range, or a contributor owns no example.
    """

    names: tuple[str, ...]
    contributor_of_example: npt.NDArray[np.int32]

    def __post_init__(self) -> None:
        owners = np.asarray(self.contributor_of_example)
        if owners.ndim != 1 or owners.dtype.kind not in "iu":
            raise DataError(
                "contributor_of_example: expected one integer per example, "
                f"found dtype {owners.dtype} and shape {owners.shape}"
            )
        repeated = sorted({name for name in self.names if self.names.count(name) > 1})
        if repeated:
            raise DataError(
                f"contributor names: expected unique names, found repeated {repeated}; rename or merge them"
            )
        if len(owners) and not 0 <= owners.min() <= owners.max() < len(self.names):
            raise DataError(
                f"contributor_of_example: expected indices 0 to {len(self.names) - 1}, "
                f"found {owners.min()} to {owners.max()}"
            )
        idle = sorted(set(range(len(self.names))) - set(np.unique(owners).tolist()))
        if idle or not self.names:
            raise DataError(
                "contributors: expected at least one, each with at least one example; "
                f"found none for {[self.names[i] for i in idle]}; leave them out or use more examples"
            )
        frozen = owners.astype(np.int32)
        frozen.setflags(write=False)
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "contributor_of_example", frozen)

    @property
    def n_contributors(self) -> int:
        return len(self.names)

    @property
    def n_examples(self) -> npt.NDArray[np.int64]:
        """`(n_contributors,)`; number of examples that each contributor owns."""
        return np.bincount(self.contributor_of_example, minlength=self.n_contributors).astype(np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the names and the assignment; equal tables have equal fingerprints."""
        digest = hashlib.sha256(json.dumps(self.names).encode())
        digest.update(self.contributor_of_example.astype("<i4").tobytes())
        return digest.hexdigest()

    def idx_of(self, name: str) -> int:
        """Index of the contributor called `name`.

        Raises:
            DataError: Nobody has this name; the message lists the known ones.
        """
        if name not in self.names:
            raise DataError(f"contributor {name!r} is unknown; expected one of {', '.join(self.names)}")
        return self.names.index(name)

    def examples_of(self, coalition_mask: CoalitionMask) -> npt.NDArray[np.int64]:
        """Sorted indices `(n_rows,)` of the examples that the coalition owns.

        Args:
            coalition_mask: `(n_contributors,)` bool; True where the contributor is present.

        Raises:
            CoalitionError: The mask is not boolean, has another length, or has nobody present.
        """
        mask = np.asarray(coalition_mask)
        if mask.dtype != np.bool_ or mask.shape != (self.n_contributors,):
            raise CoalitionError(
                f"coalition: expected a boolean mask of shape ({self.n_contributors},), "
                f"found dtype {mask.dtype} and shape {mask.shape}"
            )
        if not mask.any():
            raise CoalitionError(
                "coalition: expected at least one contributor, found none; "
                "the empty coalition has nothing to train on, its model is the untrained network"
            )
        return np.flatnonzero(mask[self.contributor_of_example]).astype(np.int64)

    def coalition_of(self, example_idx: npt.ArrayLike) -> CoalitionMask:
        """Mask `(n_contributors,)` of those who own at least one of the examples; undoes `examples_of`.

        Raises:
            CoalitionError: An index is not an integer, or not that of an example.
        """
        idx = np.asarray(example_idx)
        n_examples = len(self.contributor_of_example)
        if idx.size and (idx.dtype.kind not in "iu" or not 0 <= idx.min() <= idx.max() < n_examples):
            raise CoalitionError(
                f"example_idx: expected integers 0 to {n_examples - 1}, found dtype {idx.dtype} "
                f"from {idx.min()} to {idx.max()}"
            )
        mask = np.zeros(self.n_contributors, dtype=np.bool_)
        mask[self.contributor_of_example[idx.astype(np.int64)]] = True
        return mask


def contributors_by_class(labels: npt.NDArray[np.int64], label_names: Sequence[str]) -> ContributorTable:
    """One contributor per class that occurs, in the order of `label_names`.

    A class without an example gets no contributor, so indices equal labels only where every class occurs.

    Args:
        labels: `(n_examples,)`, indices into `label_names`.
        label_names: Name of each class.

    Raises:
        DataError: A label has no name.
    """
    present, owners = np.unique(labels, return_inverse=True)
    if len(present) and not 0 <= present[0] <= present[-1] < len(label_names):
        raise DataError(
            f"labels: expected 0 to {len(label_names) - 1} for {len(label_names)} class names, "
            f"found {present[0]} to {present[-1]}"
        )
    return ContributorTable(tuple(str(label_names[i]) for i in present), owners.astype(np.int32))


VENDOR_SIZES = {
    "vendor-01": 280,
    "vendor-02": 240,
    "vendor-03": 210,
    "vendor-04": 170,
    "vendor-05": 180,
    "vendor-06": 160,
    "vendor-07": 90,
    "vendor-08": 120,
    "vendor-09": 140,
    "vendor-10": 97,
    "vendor-11": 70,
    "vendor-12": 130,
}
"""Examples per vendor. Without the copier's they add up to the 1,797 digits."""


@dataclass(frozen=True)
class PlantedVendors:
    """What is known to be wrong with the vendors, so that an attribution can be checked against it.

    Attributes:
        noisy: Vendors whose scans carry additive Gaussian noise.
        noise_sd: Its standard deviation on the network's input scale [-1, 1]; the sum is clipped.
        copier: The vendor that delivers copies of images that another vendor also owns.
        copied: That other vendor. The copier owns nothing else.
        seed: Root seed of the streams that the partition, the noise and the copies are drawn from.
        class_concentration: Of the symmetric Dirichlet law of a vendor's class mix; smaller is less even.
    """

    noisy: tuple[str, ...]
    noise_sd: float
    copier: str
    copied: str
    seed: int
    class_concentration: float


PLANTED_VENDORS = PlantedVendors(
    noisy=("vendor-04", "vendor-09"),
    noise_sd=0.6,
    copier="vendor-07",
    copied="vendor-02",
    seed=0,
    class_concentration=4.0,
)


@dataclass(frozen=True, eq=False)
class VendorExamples:
    """The examples as the vendors deliver them.

    Attributes:
        images: `(n_examples, height, width, channels)` uint8, noise included; scans first, then copies.
        labels: `(n_examples,)`.
        contributors: Their owners.
        scan_of_example: `(n_examples,)`; the row of the original scan that each example shows.
    """

    images: Images
    labels: npt.NDArray[np.int64]
    contributors: ContributorTable
    scan_of_example: npt.NDArray[np.int64]


def vendors(images: Images, labels: npt.NDArray[np.int64]) -> VendorExamples:
    """Divide the digits among twelve vendors, some of them planted: `PLANTED_VENDORS` says who and how.

    Eleven vendors of the sizes in `VENDOR_SIZES` partition the scans. Each prefers some classes: its class
    mix is drawn from a Dirichlet law, and its scans from those still free, without replacement and with
    these weights. Two of them then deliver noisy scans. The copier owns copies of part of what another
    vendor owns; they come after the scans. The result is always the same.

    Args:
        images: `(1797, height, width, channels)` uint8, the clean scans.
        labels: `(1797,)`.

    Raises:
        DataError: The number of scans is not the one that the partition is made for.

    References:
        Efraimidis and Spirakis (2006) for weighted draws without replacement by the largest random keys.
    """
    planted = PLANTED_VENDORS
    names = tuple(VENDOR_SIZES)
    n_scans = sum(size for name, size in VENDOR_SIZES.items() if name != planted.copier)
    if len(images) != n_scans or len(labels) != n_scans:
        raise DataError(
            f"vendors: the partition is made for all {n_scans} digits, "
            f"found {len(images)} images and {len(labels)} labels; use it with the whole digits dataset"
        )

    owner_of_scan = np.full(n_scans, -1, dtype=np.int32)
    for contributor_idx, (name, size) in enumerate(VENDOR_SIZES.items()):
        if name == planted.copier:
            continue
        stream = numpy_stream(planted.seed, "data.vendors.partition", name)
        class_mix = stream.dirichlet(np.full(labels.max() + 1, planted.class_concentration))
        free = np.flatnonzero(owner_of_scan < 0)
        keys = np.log(class_mix[labels[free]]) + stream.gumbel(size=len(free))
        owner_of_scan[free[np.argsort(-keys, kind="stable")[:size]]] = contributor_idx

    copied_scans = np.flatnonzero(owner_of_scan == names.index(planted.copied))
    stream = numpy_stream(planted.seed, "data.vendors.copies")
    copies = np.sort(stream.permutation(copied_scans)[: VENDOR_SIZES[planted.copier]])
    scan_of_example = np.concatenate([np.arange(n_scans), copies])
    owners = np.concatenate([owner_of_scan, np.full(len(copies), names.index(planted.copier), dtype=np.int32)])

    delivered = images[scan_of_example]
    for name in planted.noisy:
        for scan in np.flatnonzero(owner_of_scan == names.index(name)):
            noise = numpy_stream(planted.seed, "data.vendors.noise", int(scan)).standard_normal(images.shape[1:])
            noisy = np.clip(images[scan] / 127.5 - 1.0 + planted.noise_sd * noise, -1.0, 1.0)
            delivered[scan] = np.round((noisy + 1.0) * 127.5).astype(np.uint8)
    return VendorExamples(delivered, labels[scan_of_example], ContributorTable(names, owners), scan_of_example)
