"""Tribute: credit the contributors of a diffusion model's training data.

The names below are the public interface; each is imported when it is first used, so that
`import tribute` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tribute.behaviors.base import get_behavior, measure_behaviors, register_behavior
    from tribute.config import DataConfig, Preset, StudyConfig, load_preset
    from tribute.data.sources import load_training_data
    from tribute.errors import TributeError
    from tribute.games.designs import draw_design
    from tribute.games.exact import exact_shapley
    from tribute.games.kernels import fit_add_one_in, fit_banzhaf, fit_datamodel, fit_loo
    from tribute.games.lds import compare_lds, lds, lds_ceiling
    from tribute.games.removal import draw_coalition, draw_coalitions
    from tribute.games.shapley import fit_shapley
    from tribute.games.uncertainty import difference, differences, rank_intervals, simultaneous_intervals
    from tribute.store.records import Store
    from tribute.study.run import run_study
    from tribute.study.value_function import ValueFunction
    from tribute.study.worker import Worker
    from tribute.types import Attributions

__version__ = "0.1.0"

__all__ = [
    "Attributions",
    "DataConfig",
    "Preset",
    "Store",
    "StudyConfig",
    "TributeError",
    "ValueFunction",
    "Worker",
    "compare_lds",
    "difference",
    "differences",
    "draw_coalition",
    "draw_coalitions",
    "draw_design",
    "exact_shapley",
    "fit_add_one_in",
    "fit_banzhaf",
    "fit_datamodel",
    "fit_loo",
    "fit_shapley",
    "get_behavior",
    "lds",
    "lds_ceiling",
    "load_preset",
    "load_training_data",
    "measure_behaviors",
    "rank_intervals",
    "register_behavior",
    "run_study",
    "simultaneous_intervals",
]

_HOMES = {
    "tribute.behaviors.base": ("get_behavior", "measure_behaviors", "register_behavior"),
    "tribute.config": ("DataConfig", "Preset", "StudyConfig", "load_preset"),
    "tribute.data.sources": ("load_training_data",),
    "tribute.errors": ("TributeError",),
    "tribute.games.designs": ("draw_design",),
    "tribute.games.exact": ("exact_shapley",),
    "tribute.games.kernels": ("fit_add_one_in", "fit_banzhaf", "fit_datamodel", "fit_loo"),
    "tribute.games.lds": ("compare_lds", "lds", "lds_ceiling"),
    "tribute.games.removal": ("draw_coalition", "draw_coalitions"),
    "tribute.games.shapley": ("fit_shapley",),
    "tribute.games.uncertainty": ("difference", "differences", "rank_intervals", "simultaneous_intervals"),
    "tribute.store.records": ("Store",),
    "tribute.study.run": ("run_study",),
    "tribute.study.value_function": ("ValueFunction",),
    "tribute.study.worker": ("Worker",),
    "tribute.types": ("Attributions",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name from its home."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'tribute' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    """Public names, for completion."""
    return sorted([*globals(), *__all__])
