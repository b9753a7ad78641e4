"""Work in batches that are halved where memory does not suffice, and stay so."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable
from typing import TypeVar

from tribute.errors import OutOfMemory

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_PHRASES = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "failed to allocate memory")
"""What PyTorch's allocators, CUDA and cuBLAS say; not all have an exception of their own."""


class FittingBatch:
    """How many items are worked on at once: as many as asked for, and half as many each time they do not fit.

    One is made for each kind of work and kept, so that the next coalition begins with the size that fitted.

    Args:
        size: Items at once.
        what: The work, for messages.
        setting: What lowers the need where not even one item fits, as an instruction.
        exact_from: Smaller batches change results by rounding; the size is halved past it only as a last resort.
    """

    def __init__(self, size: int, what: str, *, setting: str, exact_from: int = 1) -> None:
        self.size = size
        self.asked = size
        self.what = what
        self.setting = setting
        self.exact_from = exact_from

    @property
    def was_halved(self) -> bool:
        """Whether memory did not suffice for the size asked for."""
        return self.size < self.asked

    def map(self, n_items: int, work: Callable[[range], Result]) -> list[Result]:
        """`work` on runs of items 0 to `n_items`, in order.

        Args:
            n_items: How many.
            work: Is given the numbers of some items; it is asked again for fewer where it raised for lack of memory.

        Raises:
            OutOfMemory: Not even one item fits.
        """
        results: list[Result] = []
        start, n_failed = 0, 0
        while start < n_items:
            items = range(start, min(start + self.size, n_items))
            try:
                results.append(work(items))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                shortage = brief(error)
            else:
                start = items.stop
                continue
            # Only here: the exception, gone by now, kept what the work had allocated.
            free_memory()
            n_failed = max(n_failed, len(items))
            self._halve(len(items), shortage)
        if n_failed:
            logger.warning(
                "%s: %d at once do not fit into memory, %d do; results stay the same, but for rounding",
                self.what,
                n_failed,
                self.size,
            )
        return results

    def _halve(self, n_tried: int, shortage: str) -> None:
        if n_tried == 1:
            raise OutOfMemory(f"{self.what}: not even one at once fits into memory ({shortage}). {self.setting}")
        half = n_tried // 2
        self.size = self.exact_from if half < self.exact_from < n_tried else half


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a device or of this machine does not suffice."""
    if isinstance(error, MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return type(error).__name__ == "OutOfMemoryError" or any(phrase in str(error) for phrase in _PHRASES)


def free_memory() -> None:
    """Give back what is allocated and not used, after an error for lack of memory."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def brief(error: BaseException) -> str:
    """The first line of an error, without what allocators recommend after it."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 200 else text[:199] + "\u2026"
