"""Several processes measure one coalition together, and only one of them touches the store."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np

from tribute.diffusion.processes import Processes
from tribute.errors import TributeError
from tribute.study.value_function import Evaluation, ValueFunction
from tribute.types import CoalitionMask, Images

logger = logging.getLogger(__name__)


class Team:
    """The main process leads: it says which coalition is measured next, and the others do their share of it.

    With one process there is nobody to tell, and `measure` is the value function.

    Args:
        processes: Those of the launch.
        value_functions: v(S) by method, the same on every process.
        n_contributors: Length of a coalition.
    """

    def __init__(self, processes: Processes, value_functions: Mapping[str, ValueFunction], n_contributors: int) -> None:
        self.processes = processes
        self.value_functions = value_functions
        self.n_contributors = n_contributors
        self._methods = sorted(value_functions)

    def measure(self, method: str, coalition_mask: CoalitionMask, *, opt_seed: int) -> Evaluation:
        """v(S), by all processes; to be called on the main one while the others `follow`."""
        self.processes.agree([1, self._methods.index(method), opt_seed, *(int(present) for present in coalition_mask)])
        return self.value_functions[method](coalition_mask, opt_seed=opt_seed)

    def images(self, method: str, coalition_mask: CoalitionMask, *, opt_seed: int) -> Images:
        """The images of a coalition's model, by all processes, without measuring them; to be called as `measure`."""
        self.processes.agree([1, self._methods.index(method), opt_seed, *(int(present) for present in coalition_mask)])
        return self.value_functions[method].images(coalition_mask, opt_seed=opt_seed)[1]

    def follow(self) -> None:
        """Do this process's share of every coalition, until the main process dismisses it."""
        while True:
            is_task, method_idx, opt_seed, *present = self.processes.agree([0] * (3 + self.n_contributors))
            if not is_task:
                return
            value_function = self.value_functions[self._methods[method_idx]]
            try:
                value_function.images(np.array(present, dtype=np.bool_), opt_seed=opt_seed)
            except TributeError as error:  # the main process has it, too, and records it
                logger.debug("A coalition failed: %s", error)

    def dismiss(self) -> None:
        """Let the others end."""
        self.processes.agree([0] * (3 + self.n_contributors))
