"""Classes and contributors from the columns of a table. Both are untrusted text, and nobody is guessed."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tribute.data.contributors import ContributorTable
from tribute.data.listing import Listing, find_column, python_values
from tribute.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa


MAX_DIGITS = 4_000


def read_labels(listing: Listing, column_name: str) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """The class of every example: numbers of named classes, plain numbers, or names, which are sorted.

    Returns:
        Labels `(n_examples,)` and the names that they point into.

    Raises:
        DataError: A class is missing or has no name; the message names the row.
    """
    import pyarrow as pa

    column = listing.column(column_name)
    if not pa.types.is_integer(column.type):
        if not _is_text(column.type):
            raise DataError(f"column {column_name!r}: expected classes as integers or text, found {column.type}")
        texts = python_values(column, f"column {column_name!r}")
        values = [_text(value, listing, row, column_name) for row, value in enumerate(texts)]
        names = _in_order(values)
        idx_of = {name: idx for idx, name in enumerate(names)}
        return np.array([idx_of[value] for value in values], dtype=np.int64), names
    if column.null_count:
        row = column.to_pylist().index(None)
        raise DataError(f"{listing.place(row)}: column {column_name!r}: expected a class in every row, found none")
    labels = column.to_numpy().astype(np.int64)
    names = listing.class_names.get(column_name)
    if names and (odd := [name for name in names if not name.isprintable()]):
        raise DataError(f"column {column_name!r}: expected names of classes that can be printed, found {odd[0]!a}")
    outside = np.flatnonzero((labels < 0) | (labels >= len(names) if names else False))
    if len(outside):
        row = int(outside[0])
        expected = f"from 0 to {len(names) - 1}" if names else "of 0 or more"
        raise DataError(
            f"{listing.place(row)}: column {column_name!r}: expected a class {expected}, found {labels[row]}"
        )
    if names:
        return labels, names
    # Those that occur, not all up to the largest: a class may be called 1,000,000,007.
    numbers, labels = np.unique(labels, return_inverse=True)
    return labels.astype(np.int64), tuple(map(str, numbers))


def read_contributors(listing: Listing, column_name: str, rows: npt.NDArray[np.int64]) -> ContributorTable:
    """The owner of every example in `rows`, from a column of names, of numbers, or of numbers of named classes.

    Contributors are in the order of their names, of their numbers, or of their classes: never in that of the rows.

    Raises:
        DataError: The column is absent (the message lists those found), a row names nobody, a name cannot be
            printed, or two names look the same; the message names the row.
    """
    owners = read_owners(listing, column_name, rows)
    problems = [*owners.problems.values(), *(error for _, error in twin_names(owners.names) if error)]
    if problems:
        more = f" (and {len(problems) - 1:,} more: tribute data check lists them)" if len(problems) > 1 else ""
        raise DataError(problems[0] + more)
    return ContributorTable(owners.names, owners.owner_of_row)


@dataclass(frozen=True, eq=False)
class Owners:
    """A column of owners as it was found.

    Attributes:
        names: In order, each once.
        owner_of_row: Index into `names` for each of the rows that were read; -1 where there is a problem.
        problems: What is wrong, by position among these rows.
    """

    names: tuple[str, ...]
    owner_of_row: npt.NDArray[np.int32]
    problems: dict[int, str]


def read_owners(listing: Listing, column_name: str, rows: npt.NDArray[np.int64]) -> Owners:
    """Read the owners of some rows and note what is wrong with each.

    Raises:
        DataError: The column is absent; the message lists those found.
    """
    found = listing.column_names
    name = find_column(
        "contributors",
        "contributor of each image",
        (column_name,),
        found,
        remedy="name another with --contributor_column",
    )
    values = python_values(listing.column(name).take(rows), f"column {name!r}")
    class_names = listing.class_names.get(name)
    if class_names:
        values = [class_names[v] if isinstance(v, int) and 0 <= v < len(class_names) else None for v in values]
    texts: list[str | None] = []
    problems: dict[int, str] = {}
    for position, value in enumerate(values):
        try:
            texts.append(_text(value, listing, int(rows[position]), name))
        except DataError as error:
            problems[position] = str(error)
            texts.append(None)
    known = {text for text in texts if text is not None}
    names = tuple(text for text in class_names if text in known) if class_names else _in_order(known)
    idx_of: dict[str | None, int] = {text: i for i, text in enumerate(names)}
    return Owners(names, np.array([idx_of.get(text, -1) for text in texts], dtype=np.int32), problems)


def twin_names(names: Iterable[str]) -> list[tuple[list[str], str | None]]:
    """Names that collide once Unicode (NFC), white space and case are set aside.

    Returns:
        Groups of colliding names, with an error for those that differ in nothing a reader can see (white space or
        Unicode form), and None for those that differ in case, which may be two people.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[_seen(name).casefold()].append(name)
    twins = []
    for group in (group for group in groups.values() if len(group) > 1):
        alike = len({_seen(name) for name in group}) < len(group)
        error = (
            f"contributors: expected names that a reader can tell apart, found {', '.join(map(ascii, group))}, which "
            "differ in white space or Unicode form only; write each name in one way"
        )
        twins.append((group, error if alike else None))
    return twins


def _seen(name: str) -> str:
    """A name as a reader sees it."""
    return " ".join(unicodedata.normalize("NFC", name).split())


def _text(value: Any, listing: Listing, row: int, column_name: str) -> str:
    """A name that can be printed, from text or from a whole number."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a CSV column of numbers with a gap is read as floats
    # Some programs write what is missing as NaN, as a number or as text.
    if value is None or str(value).strip() in ("", "nan", "NaN"):
        found = "none" if value is None else repr(value)
        raise DataError(
            f"{listing.place(row)}: column {column_name!r}: expected a name, found {found}; "
            "name the owner or leave the row out"
        )
    text = str(value)
    if isinstance(value, float | bytes | list | dict) or not text.isprintable():
        raise DataError(
            f"{listing.place(row)}: column {column_name!r}: expected a printable name or a whole number, "
            f"found {ascii(value)[:80]}"
        )
    return text


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or str(kind) == "string_view"


def _in_order(texts: Iterable[str]) -> tuple[str, ...]:
    """Each text once: by value where all are numbers, else by the alphabet."""
    unique = set(texts)
    if all(_is_number(text) for text in unique):
        return tuple(sorted(unique, key=lambda text: (int(text), text)))
    return tuple(sorted(unique))


def _is_number(text: str) -> bool:
    """Whether it is a whole number, of fewer digits than Python refuses to read."""
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdigit() and len(digits) <= MAX_DIGITS


def select_classes(
    labels: npt.NDArray[np.int64], label_names: Sequence[str], classes: Sequence[int]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], tuple[str, ...]]:
    """The rows of some classes.

    Args:
        labels: `(n_examples,)`, indices into `label_names`.
        label_names: Of the classes in the order of their numbers; or their numbers, perhaps not all.
        classes: Numbers of the classes to keep.

    Returns:
        Rows `(n_rows,)`, their labels as indices into `classes`, and the names of these.

    Raises:
        DataError: The dataset has no such class.
    """
    are_numbers = all(_is_number(name) for name in label_names)
    name_of = {int(name) if are_numbers else i: name for i, name in enumerate(label_names)}
    if max(classes) > max(name_of):
        raise DataError(
            f"expected at least {max(classes) + 1} classes, found {max(name_of) + 1}; is it another dataset?"
        )
    place_of = {number: i for i, number in enumerate(classes)}
    new_label = np.array([place_of.get(number, -1) for number in name_of], dtype=np.int64)
    rows = np.flatnonzero(new_label[labels] >= 0)
    return rows, new_label[labels[rows]], tuple(name_of.get(number, str(number)) for number in classes)
