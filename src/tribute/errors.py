"""The exceptions that Tribute raises on purpose.

Every message says what was expected, what was found and what to do about it. Code that
catches `TributeError` catches everything that a user can repair; anything else is a bug.
"""


def printable(text: str) -> str:
    """Text of others as it may stand in a message: what a terminal would obey instead of show is escaped.

    Line feeds and tabs stay; half characters, as names of files that are not UTF-8 have them, are escaped.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


class TributeError(Exception):
    """Base of all errors that a user can repair."""


class ConfigError(TributeError):
    """A setting is unknown, out of range, or contradicts another."""


class DataError(TributeError):
    """Training data cannot be read, or is not what the settings say."""


class CheckpointError(TributeError):
    """A checkpoint is missing, damaged, unsafe, or belongs to another model."""


class StoreError(TributeError):
    """The store cannot be opened, or its schema is not one that this version reads."""


class MixedResultsError(TributeError):
    """What is on disk was made with other settings than the ones asked for."""


class BehaviorError(TributeError):
    """A model behavior cannot be measured, or is not a finite number."""


class OutOfMemory(TributeError):
    """The memory of a device or machine does not suffice; the message names the setting that lowers the need."""


class CoalitionError(TributeError):
    """A coalition is empty, of the wrong length, or not one that the operation allows."""


class FitError(TributeError):
    """Attributions cannot be fitted to the evaluations given."""


class RankDeficientFit(FitError):
    """The coalitions do not identify every contributor; the message names those."""


class StoppedEarly(TributeError):
    """Work was asked to end before it was done; what it made is kept, and running it again continues it."""


class NotImplementedYet(TributeError):
    """A documented method that this version does not provide."""
