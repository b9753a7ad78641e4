"""The processes that work on one model together: one, or those that `accelerate launch` started."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from tribute.types import Images

if TYPE_CHECKING:
    from accelerate import Accelerator


class Processes:
    """What the processes of a launch tell each other, besides gradients.

    Args:
        accelerator: Knows the others.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    @property
    def n(self) -> int:
        """How many there are."""
        return self._accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes."""
        return self._accelerator.is_main_process

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The others enter when the main process has left."""
        with self._accelerator.main_process_first():
            yield

    def agree(self, numbers: Sequence[int]) -> list[int]:
        """The numbers of the main process, on every process; as many are given on each."""
        from accelerate.utils import broadcast

        tensor = torch.tensor(list(numbers), dtype=torch.int64, device=self._accelerator.device)
        if self.n > 1:
            tensor = broadcast(tensor)
        return [int(number) for number in tensor]  # pyright: ignore[reportGeneralTypeIssues, reportOptionalIterable]

    def divide(self, n_images: int, make: Callable[[Sequence[int]], Images]) -> Images:
        """Images 0 to `n_images` `(n_images, height, width, channels)`, each made by one of the processes.

        Args:
            n_images: How many.
            make: Makes the images with some numbers, at least one.
        """
        if self.n == 1:
            return make(range(n_images))
        from accelerate.utils import gather

        share = -(-n_images // self.n)
        first = self._accelerator.process_index * share
        mine = range(first, min(first + share, n_images))
        images = make(mine or range(1))[: len(mine)]  # none to make: one tells the others' shape
        padded = np.zeros((share, *images.shape[1:]), dtype=images.dtype)
        padded[: len(images)] = images
        gathered = gather(torch.from_numpy(padded).to(self._accelerator.device))
        return gathered.cpu().numpy()[:n_images]  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
