"""Which evaluations a study asks for: coalitions, methods and training seeds, in the order of their worth."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from tribute.config import StudyConfig
from tribute.errors import FitError
from tribute.games.coalitions import empty_coalition, grand_coalition, mask_from_idx
from tribute.games.designs import PAIRED_DESIGNS, coalitions_from
from tribute.store.records import EvaluationSpec
from tribute.types import CoalitionMask


def plan_evaluations(
    config: StudyConfig, n_contributors: int, settings: dict[str, dict[str, Any]]
) -> Iterator[EvaluationSpec]:
    """All evaluations of a study: end points first, then fit coalitions, then test coalitions seed by seed.

    Fit and test coalitions are distinct, and no coalition is both: a draw that was seen before is passed
    over, so seed j, or row j of a design, names the same coalition in every study of as many contributors.

    Raises:
        FitError: There are fewer such coalitions than asked for.
    """

    def spec(method: str, role: str, mask: Any, opt_seed: int, **draw: Any) -> EvaluationSpec:
        return EvaluationSpec(
            exp_name=config.name,
            dataset=config.dataset,
            method=method,
            removal_dist=draw.get("removal_dist"),
            datamodel_alpha=draw.get("datamodel_alpha"),
            removal_seed=draw.get("removal_seed"),
            coalition_mask=mask,
            opt_seed=opt_seed,
            settings=settings[method],
            role=role,
            priority=("empty", "grand", "fit", "loo", "test").index(role),
        )

    for repeat in range(config.fit.n_end_points):
        opt_seed = config.opt_seed + repeat
        yield spec("gd", "empty", empty_coalition(n_contributors), opt_seed, removal_dist="empty")
        yield spec("gd", "grand", grand_coalition(n_contributors), opt_seed)
    test = distinct_draws(
        "datamodel",
        n_contributors,
        config.test.n_coalitions,
        config.test.first_removal_seed,
        config.test.datamodel_alpha,
        seen=set(),
    )
    fit = distinct_draws(
        config.fit.drawn_from,
        n_contributors,
        config.fit.n_coalitions,
        config.fit.first_removal_seed,
        config.fit.datamodel_alpha,
        seen={mask.tobytes() for _, mask in test},
    )
    for removal_seed, mask in fit:
        yield spec(
            "gd",
            "fit",
            mask,
            config.opt_seed,
            removal_dist=config.fit.drawn_from,
            datamodel_alpha=config.fit.datamodel_alpha if config.fit.drawn_from == "datamodel" else None,
            removal_seed=removal_seed,
        )
    if config.fit.leave_one_out:
        for contributor_idx in range(n_contributors):
            mask = ~mask_from_idx([contributor_idx], n_contributors)
            yield spec("gd", "loo", mask, config.opt_seed, removal_dist="loo", removal_seed=contributor_idx)
    for opt_seed in config.test.opt_seeds:
        for removal_seed, mask in test:
            yield spec(
                "retrain",
                "test",
                mask,
                opt_seed,
                removal_dist="datamodel",
                datamodel_alpha=config.test.datamodel_alpha,
                removal_seed=removal_seed,
            )


def distinct_draws(
    removal_dist: str, n_contributors: int, n_coalitions: int, first_seed: int, alpha: float, *, seen: set[bytes]
) -> list[tuple[int, CoalitionMask]]:
    """The first distinct coalitions of a removal distribution or design, with their removal seeds.

    Of complement pairs both must be new, or neither is taken.
    """
    together = 2 if removal_dist in PAIRED_DESIGNS else 1
    n_tries = first_seed + 1000 + 100 * n_coalitions
    rows = coalitions_from(removal_dist, n_contributors, first_seed - first_seed % together, datamodel_alpha=alpha)
    seen = set(seen)
    draws: list[tuple[int, CoalitionMask]] = []
    while len(draws) < n_coalitions:
        group = list(islice(rows, together))
        if not group or group[0][0] > n_tries:
            raise FitError(
                f"{removal_dist}: expected {n_coalitions} distinct coalitions of {n_contributors} contributors, "
                f"found only {len(draws)} that are not test coalitions; ask for fewer"
            )
        keys = {mask.tobytes() for _, mask in group}
        if not keys & seen:
            seen |= keys
            draws += group
    return draws[:n_coalitions]
