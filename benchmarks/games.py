"""Games that resemble model behaviors, for any number of contributors, with known Shapley values.

A game is a function of a sum: every contributor adds a vector of statistics (images per category, moments of
features, histogram of scores) to those of a background, the images of an untrained network, and the behavior is a
function of the total. So the empty coalition has a finite value, all coalitions are evaluated at once, and Shapley
values can be had to any precision. Instances are random: sizes are log-normal, about a tenth of the contributors are
useless and another tenth harmful, where the behavior can be harmed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.special import entr, expit, gammaln, ndtr

from tribute.files import write_whole
from tribute.games.coalitions import coalition_keys
from tribute.seeding import numpy_stream
from tribute.types import Behaviors, CoalitionMasks

Array = npt.NDArray[np.float64]

MAX_ENUMERATED = 16
"""Most contributors whose Shapley values are enumerated where there is no formula; beyond, they are sampled."""

TOLERANCE = 0.002
"""Relative standard error of the sampled contrasts at which sampling stops: well below the error of any estimate."""

MAX_BATCHES = 4000


@dataclass(frozen=True)
class Truth:
    """Shapley values of a game.

    Attributes:
        values: `(n_contributors,)`.
        relative_error: Standard error of the contrasts, as a share of their norm; 0 where the values are exact.
        source: `formula`, `enumeration` or `sampling`.
    """

    values: Array
    relative_error: float
    source: str


@dataclass(frozen=True)
class Game:
    """A value function `behavior(background + masks @ contributions)`.

    Attributes:
        name: Which kind of game, a key of `GAMES`.
        seed: Which instance.
        contributions: `(n_contributors, n_statistics)`, what each contributor adds.
        background: `(n_statistics,)`, what is there without anybody.
        behavior: From totals `(..., n_statistics)` to values `(...)`.
        formula: The exact Shapley values `(n_contributors,)`, where there is a closed form.
    """

    name: str
    seed: int
    contributions: Array
    background: Array
    behavior: Callable[[Array], Array]
    formula: Callable[[], Array] | None = None

    @property
    def n_contributors(self) -> int:
        return len(self.contributions)

    def value(self, masks: CoalitionMasks) -> Behaviors:
        """Values `(n_coalitions,)` of coalitions `(n_coalitions, n_contributors)`, without noise."""
        return self.behavior(self.background + masks @ self.contributions)

    @cached_property
    def end_points(self) -> tuple[float, float]:
        """Values of the empty and the grand coalition."""
        v_empty, v_grand = self.value(np.array([[False], [True]]).repeat(self.n_contributors, axis=1))
        return float(v_empty), float(v_grand)

    @cached_property
    def spread(self) -> float:
        """Standard deviation of the value over random coalitions of half the contributors."""
        return float(self.value(half_coalitions(self.n_contributors, 2000, self.seed, "spread")).std())

    def truth(self, cache_dir: Path | None = None) -> Truth:
        """Shapley values by formula, by enumeration, or sampled to `TOLERANCE` and then kept in `cache_dir`."""
        if self.formula is not None:
            return Truth(self.formula(), 0.0, "formula")
        if self.n_contributors <= MAX_ENUMERATED:
            return Truth(enumerated_shapley(self), 0.0, "enumeration")
        return sampled_truth(self) if cache_dir is None else _cached_truth(self, cache_dir)


@dataclass(frozen=True)
class NoisyGame:
    """A game whose evaluations carry noise; measuring a coalition again gives the same number, as in a store.

    Attributes:
        game: The game without noise.
        noise: Standard deviation of the noise as a fraction of `game.spread`.
        seed: Which noise. Another level of the same seed is the same noise, scaled.
    """

    game: Game
    noise: float
    seed: int

    @property
    def noise_sd(self) -> float:
        """Standard deviation of the noise of one evaluation, in the unit of the game."""
        return self.noise * self.game.spread

    def value(self, masks: CoalitionMasks) -> Behaviors:
        """Measured values `(n_coalitions,)`; the empty and the grand coalition are measured without noise."""
        values = self.game.value(masks)
        if self.noise:
            proper = masks.any(axis=1) & ~masks.all(axis=1)
            values = values + self.noise_sd * proper * _coalition_noise(self.game.name, self.seed, masks)
        return values


def make_game(name: str, n_contributors: int, seed: int) -> Game:
    """Draw the instance `seed` of a kind of game, a key of `GAMES`."""
    return GAMES[name](name, n_contributors, seed)


def cache_dir_of_user() -> Path:
    """Where sampled Shapley values are kept unless told otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tribute" / "benchmarks"


def half_coalitions(n_contributors: int, n_coalitions: int, seed: int, purpose: str) -> CoalitionMasks:
    """Random coalitions `(n_coalitions, n_contributors)` of half the contributors."""
    uniforms = numpy_stream(seed, "benchmark_half", purpose, n_contributors).random((n_coalitions, n_contributors))
    return uniforms.argsort(axis=1).argsort(axis=1) < n_contributors // 2


def contrasts(values: Array) -> Array:
    """Credit less its mean, along the last axis."""
    return values - values.mean(axis=-1, keepdims=True)


def relative_error(estimate: Array, truth: Array) -> float:
    """Norm of the error of the contrasts as a share of the norm of the true ones."""
    return float(np.linalg.norm(contrasts(estimate - truth)) / np.linalg.norm(contrasts(truth)))


# Truth


def enumerated_shapley(game: Game) -> Array:
    """Shapley values from all coalitions: each value times the weights of the marginals that it is part of."""
    n = game.n_contributors
    masks = (np.arange(2**n)[:, None] >> np.arange(n)) & 1 == 1
    sizes, values = masks.sum(axis=1), game.value(masks)
    log_orders = gammaln(n + 1)
    # log k! (n-k-1)! / n! for k others present, padded so that the impossible ends have weight 0.
    log_weights = gammaln(np.arange(1, n + 1)) + gammaln(np.arange(n, 0, -1)) - log_orders
    weights = np.concatenate([[0.0], np.exp(log_weights), [0.0]])
    return masks.T @ (weights[sizes] * values) - ~masks.T @ (weights[sizes + 1] * values)


def sampled_truth(game: Game, *, tolerance: float = TOLERANCE, n_levels: int = 256) -> Truth:
    """Sample Shapley values until the contrasts have the relative standard error `tolerance`.

    One coalition gives a marginal of every contributor: phi_i is the mean of v(S + i) - v(S - i) over a uniform q and
    coalitions S in which everybody is present with probability q. What the marginals of one S share cancels in the
    contrasts. The levels q are stratified, and the uniforms u and 1 - u give an antithetic pair. The credit is then
    shifted to sum to v(grand) - v(empty).

    References:
        Owen (1972), multilinear extensions; Mitchell et al. (2022), antithetic sampling.
    """
    n = game.n_contributors
    stream = numpy_stream(game.seed, "benchmark_truth", game.name, n)
    n_levels = max(8, min(n_levels, 300_000 // game.contributions.size))
    batches: list[Array] = []
    error = np.inf
    while len(batches) < MAX_BATCHES and error > tolerance:
        levels = (np.arange(n_levels) + stream.random(n_levels)) / n_levels
        uniforms = stream.random((n_levels, n))
        pair = [_all_marginals(game, u < levels[:, None]).mean(axis=0) for u in (uniforms, 1.0 - uniforms)]
        batches.append(contrasts(np.mean(pair, axis=0)))
        if len(batches) >= 32 and len(batches) % 16 == 0:
            estimate = np.mean(batches, axis=0)
            variance = np.var(batches, axis=0, ddof=1).sum() / len(batches)
            error = float(np.sqrt(variance) / np.linalg.norm(estimate))
    v_empty, v_grand = game.end_points
    return Truth(np.mean(batches, axis=0) + (v_grand - v_empty) / n, error, "sampling")


def _all_marginals(game: Game, masks: CoalitionMasks) -> Array:
    """v(S + i) - v(S - i) for every row S and contributor i, `(n_coalitions, n_contributors)`."""
    totals = game.background + masks @ game.contributions
    signs = np.where(masks, -1.0, 1.0)
    toggled = game.behavior(totals[:, None] + signs[:, :, None] * game.contributions)
    return signs * (toggled - game.behavior(totals)[:, None])


def _cached_truth(game: Game, cache_dir: Path) -> Truth:
    """The sampled truth of a file in `cache_dir`, or sampled and written there if the file tells of another game."""
    path = cache_dir / f"{game.name}_n{game.n_contributors}_seed{game.seed}.json"
    # Ten digits of some values: the same on every machine, and different for every other instance.
    values = game.value(half_coalitions(game.n_contributors, 16, game.seed, "fingerprint"))
    told = " ".join(f"{v:.9e}" for v in (*game.end_points, *values, TOLERANCE))
    fingerprint = hashlib.sha256(told.encode()).hexdigest()[:16]
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["fingerprint"] == fingerprint:
            return Truth(np.array(kept["values"]), kept["relative_error"], "sampling")
    truth = sampled_truth(game)
    kept = {"fingerprint": fingerprint, "relative_error": truth.relative_error, "values": truth.values.tolist()}
    write_whole(path, json.dumps(kept))
    return truth


def _coalition_noise(name: str, seed: int, masks: CoalitionMasks) -> Array:
    """Standard normal noise `(n_coalitions,)`, a function of the coalition."""
    return np.array([_noise_of_key(name, seed, key) for key in coalition_keys(masks)])


@lru_cache(maxsize=200_000)
def _noise_of_key(name: str, seed: int, key: str) -> float:
    return float(numpy_stream(seed, "benchmark_noise", name, key).standard_normal())


def _multilinear_shapley(absences: Array, gains: Array) -> Array:
    """Shapley values of sum_c gains_c (1 - prod over i present of absences_ic), by quadrature that is exact.

    phi_i = sum_c gains_c (1 - a_ic) times the integral over q of prod over j != i of (1 - q + q a_jc), a polynomial
    of degree n - 1 in q.
    """
    n = len(absences)
    nodes, weights = np.polynomial.legendre.leggauss(n // 2 + 1)
    credit = np.zeros(n)
    for q, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        logs = np.log1p(-q * (1.0 - absences))
        credit += weight * ((1.0 - absences) * np.exp(logs.sum(axis=0) - logs)) @ gains
    return credit


# Kinds of games


def saturation(name: str, n: int, seed: int) -> Game:
    """Concave in the amount of data: 1 - exp(-4 share)."""
    size, useless, _ = _contributors(name, n, seed)
    size[useless] = 0.0
    shares = 4.0 * size[:, None] / size.sum()
    return Game(
        name,
        seed,
        shares,
        np.zeros(1),
        lambda total: -np.expm1(-total[..., 0]),
        lambda: _multilinear_shapley(np.exp(-shares), np.ones(1)),
    )


def pairwise(name: str, n: int, seed: int) -> Game:
    """Additive credit and interactions of pairs, which hold as much of the variance."""
    size, useless, harmful = _contributors(name, n, seed)
    stream = numpy_stream(seed, "benchmark_game", name, n, "pairs")
    size[useless] = 0.0
    own = np.where(harmful, -size, size)
    pairs = np.triu(stream.standard_normal((n, n)), 1)
    pairs[useless], pairs[:, useless] = 0.0, 0.0
    # Pairs in +-1/2 coding have the variance |B|^2 / 16 at random coalitions, own credit that of |a|^2 / 4.
    pairs *= 2.0 * np.linalg.norm(own) / np.linalg.norm(pairs)
    pairs = pairs + pairs.T
    own = own - pairs.sum(axis=1) / 2  # centres the pairs: half coalitions see only the interaction
    return Game(
        name,
        seed,
        np.eye(n),
        np.zeros(n),
        lambda total: total @ own + 0.5 * ((total @ pairs) * total).sum(axis=-1),
        lambda: own + 0.5 * pairs.sum(axis=1),
    )


def percentile(name: str, n: int, seed: int) -> Game:
    """The 90th percentile of all images' scores, as of aesthetic scores, from their histogram."""
    size, useless, harmful = _contributors(name, n, seed)
    stream = numpy_stream(seed, "benchmark_game", name, n, "scores")
    grid = np.linspace(-5.0, 5.0, 41)
    centre, width = stream.normal(0.0, 0.8, n), stream.uniform(0.4, 1.0, n)
    centre[harmful] -= 1.5
    size[useless] *= 0.01
    below = size[:, None] * ndtr((grid - centre[:, None]) / width[:, None])
    untrained = 0.15 * size.sum()
    background = untrained * np.append(ndtr((grid + 2.0) / 0.5), 1.0)

    def behavior(total: Array) -> Array:
        cdf = total[..., :-1] / total[..., -1:]
        upper = np.clip((cdf < 0.9).sum(axis=-1), 1, len(grid) - 1)[..., None]
        low, high = (np.take_along_axis(cdf, upper - step, axis=-1)[..., 0] for step in (1, 0))
        fraction = (0.9 - low) / np.maximum(high - low, 1e-12)
        return grid[upper[..., 0] - 1] + (grid[1] - grid[0]) * fraction

    return Game(name, seed, np.hstack([below, size[:, None]]), background, behavior)


def entropy(name: str, n: int, seed: int) -> Game:
    """Entropy of the categories generated; an untrained network knows one category, which harmful ones repeat."""
    size, useless, harmful = _contributors(name, n, seed)
    categories = _categories(name, n, seed)
    categories[harmful] = np.eye(categories.shape[1])[0]
    size[useless] *= 0.01
    background = 0.05 * size.sum() * np.eye(categories.shape[1])[0]
    return Game(name, seed, size[:, None] * categories, background, _entropy_of_counts)


def inception_score(name: str, n: int, seed: int) -> Game:
    """Like the Inception Score: exp(entropy of the mean prediction less the mean entropy of predictions).

    A contributor's images are of its categories, each recognised up to a blur; harmful ones are blurred; an untrained
    network's images are recognised as nothing, which makes a score of 1.
    """
    size, useless, harmful = _contributors(name, n, seed)
    categories = _categories(name, n, seed)
    n_categories = categories.shape[1]
    blur = numpy_stream(seed, "benchmark_game", name, n, "blur").uniform(0.05, 0.3, n)
    blur[harmful] = 0.9
    size[useless] *= 0.01
    predictions = (1.0 - blur[:, None]) * categories + blur[:, None] / n_categories
    sharp, other = 1.0 - blur + blur / n_categories, blur / n_categories
    entropies = entr(sharp) + (n_categories - 1) * entr(other)
    background = 0.1 * size.sum() * np.append(np.full(n_categories, 1.0 / n_categories), np.log(n_categories))

    def behavior(total: Array) -> Array:
        counts = np.clip(total[..., :-1], 0.0, None)
        return np.exp(_entropy_of_counts(counts) - total[..., -1] / counts.sum(axis=-1))

    return Game(name, seed, size[:, None] * np.hstack([predictions, entropies[:, None]]), background, behavior)


def frechet(name: str, n: int, seed: int) -> Game:
    """Like FID: the Frechet distance between the features generated and those of the useful contributors.

    Features have four independent pairs of dimensions, so that the square root of a matrix is a formula. Harmful
    contributors lie off the reference, and get little credit: they still beat an untrained network, whose images are
    far from it and all alike.
    """
    size, useless, harmful = _contributors(name, n, seed)
    mean, covariance = _features(name, n, seed)
    mean[harmful] += 2.5
    size[useless] *= 0.01
    moments = _moments(size, mean, covariance)
    reference_mean, reference = _block_gaussians(moments[~harmful].sum(axis=0))
    background = _moments(
        np.array([0.15 * size.sum()]), np.full((1, 4, 2), -2.0), np.tile([0.01, 0.0, 0.01], (1, 4, 1))
    )

    def behavior(total: Array) -> Array:
        found_mean, found = _block_gaussians(total)
        product_trace = (found * reference * np.array([1.0, 2.0, 1.0])).sum(axis=-1)
        root = np.sqrt(product_trace + 2.0 * np.sqrt(_determinants(found) * _determinants(reference)))
        traces = found[..., 0] + found[..., 2] + reference[..., 0] + reference[..., 2]
        return ((found_mean - reference_mean) ** 2).sum(axis=(-1, -2)) + (traces - 2.0 * root).sum(axis=-1)

    return Game(name, seed, moments, background[0], behavior)


def diversity(name: str, n: int, seed: int) -> Game:
    """Log-volume of the generated features: half the log-determinant of their covariance.

    Harmful contributors bring many near copies of one image; an untrained network makes one image.
    """
    size, useless, harmful = _contributors(name, n, seed)
    mean, covariance = _features(name, n, seed)
    mean[harmful], covariance[harmful] = 0.0, 0.02 * covariance[harmful]
    size[harmful] *= 2.0
    size[useless] *= 0.01
    background = _moments(np.array([0.1 * size.sum()]), np.zeros((1, 4, 2)), np.tile([0.01, 0.0, 0.01], (1, 4, 1)))

    def behavior(total: Array) -> Array:
        found = _block_gaussians(total)[1]
        return 0.5 * np.log(_determinants(found) + 1e-4).sum(axis=-1)

    return Game(name, seed, _moments(size, mean, covariance), background[0], behavior)


def coverage(name: str, n: int, seed: int) -> Game:
    """Share of 60 kinds of images that somebody present covers; harmful ones add kinds that should not be."""
    size, useless, harmful = _contributors(name, n, seed)
    stream = numpy_stream(seed, "benchmark_game", name, n, "kinds")
    n_kinds = 60
    chances = stream.dirichlet(np.full(n_kinds - 5, 0.1), n) * (30.0 * size / size.sum())[:, None]
    chances = np.hstack([chances, np.zeros((n, 5))])
    chances[harmful, -5:] = stream.uniform(0.0, 1.0, (int(harmful.sum()), 5))
    chances[useless] = 0.0
    gains = np.append(stream.dirichlet(np.ones(n_kinds - 5)), np.full(5, -0.03))
    return Game(
        name,
        seed,
        chances,
        np.zeros(n_kinds),
        lambda total: -np.expm1(-total) @ gains,
        lambda: _multilinear_shapley(np.exp(-chances), gains),
    )


def learning_curve(name: str, n: int, seed: int) -> Game:
    """Accuracy over eight tasks, each by a power law in its clean examples, less the share of wrong labels."""
    size, useless, harmful = _contributors(name, n, seed)
    tasks = _categories(name, n, seed, n_categories=8)
    stream = numpy_stream(seed, "benchmark_game", name, n, "tasks")
    gains = stream.dirichlet(np.full(8, 3.0))
    size[useless] = 0.0
    wrong = np.where(harmful, 0.8, 0.05)
    scale = 0.05 * size.sum() * stream.uniform(0.5, 2.0, 8)
    contributions = size[:, None] * np.hstack([(1.0 - wrong[:, None]) * tasks, wrong[:, None]])
    untrained = 0.1 * size.sum()

    def behavior(total: Array) -> Array:
        clean = np.clip(total[..., :-1], 0.0, None)
        learnt = (1.0 - (1.0 + clean / scale) ** -0.7) @ gains
        return learnt - 0.3 * total[..., -1] / (total.sum(axis=-1) + untrained)

    return Game(name, seed, contributions, np.zeros(9), behavior)


def emergence(name: str, n: int, seed: int) -> Game:
    """A concept that appears once there is enough data for it: a sigmoid of the share present."""
    size, useless, harmful = _contributors(name, n, seed)
    size[useless] = 0.0
    size[harmful] *= -0.5
    shares = size[:, None] / size.sum()
    return Game(name, seed, shares, np.zeros(1), lambda total: expit((total[..., 0] - 0.5) / 0.12))


def nearest(name: str, n: int, seed: int) -> Game:
    """Similarity of one image to the nearest training image, softly: a few contributors hold nearly all credit."""
    _, useless, _ = _contributors(name, n, seed)
    similarity = numpy_stream(seed, "benchmark_game", name, n, "similarity").standard_normal(n)
    weights = np.where(useless, 0.0, np.exp(similarity / 0.4))
    return Game(name, seed, weights[:, None], np.ones(1), lambda total: 0.4 * np.log(total[..., 0]))


GAMES: dict[str, Callable[[str, int, int], Game]] = {
    game.__name__: game
    for game in (
        saturation,
        entropy,
        pairwise,
        percentile,
        frechet,
        inception_score,
        diversity,
        coverage,
        learning_curve,
        emergence,
        nearest,
    )
}
"""Kinds of games by name: the first four are those that the estimators' settings were chosen on."""


def _contributors(name: str, n: int, seed: int) -> tuple[Array, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Log-normal amounts of data, who is useless and who is harmful, each `(n,)`; nobody of fewer than four is."""
    stream = numpy_stream(seed, "benchmark_game", name, n)
    order = stream.permutation(n)
    n_each = max(1, n // 10) if n >= 4 else 0
    return stream.lognormal(0.0, 0.8, n), order < n_each, (order >= n_each) & (order < 2 * n_each)


def _categories(name: str, n: int, seed: int, n_categories: int = 10) -> Array:
    """Shares `(n, n_categories)` of the categories in each contributor's data, few of them large."""
    return numpy_stream(seed, "benchmark_game", name, n, "categories").dirichlet(np.full(n_categories, 0.3), n)


def _features(name: str, n: int, seed: int) -> tuple[Array, Array]:
    """Means `(n, 4, 2)` and covariances `(n, 4, 3)`, as xx, xy, yy, of each contributor's features."""
    stream = numpy_stream(seed, "benchmark_game", name, n, "features")
    mean = stream.normal(0.0, 0.7, (n, 4, 2))
    factor = stream.normal(0.0, 0.5, (n, 4, 2, 2))
    full = factor @ factor.swapaxes(-1, -2)
    return mean, full[..., [0, 0, 1], [0, 1, 1]]


def _moments(size: Array, mean: Array, covariance: Array) -> Array:
    """Counts, first and second moments `(n, 1 + 8 + 12)`, which add up over contributors."""
    second = covariance + mean[..., [0, 0, 1]] * mean[..., [0, 1, 1]]
    n = len(size)
    return size[:, None] * np.hstack([np.ones((n, 1)), mean.reshape(n, -1), second.reshape(n, -1)])


def _block_gaussians(total: Array) -> tuple[Array, Array]:
    """Means `(..., 4, 2)` and covariances `(..., 4, 3)` of summed moments `(..., 21)`."""
    moments = total[..., 1:] / total[..., :1]
    mean = moments[..., :8].reshape(*total.shape[:-1], 4, 2)
    second = moments[..., 8:].reshape(*total.shape[:-1], 4, 3)
    return mean, second - mean[..., [0, 0, 1]] * mean[..., [0, 1, 1]]


def _determinants(covariance: Array) -> Array:
    """Determinants `(..., 4)` of covariances `(..., 4, 3)`."""
    return np.clip(covariance[..., 0] * covariance[..., 2] - covariance[..., 1] ** 2, 0.0, None)


def _entropy_of_counts(counts: Array) -> Array:
    """Entropy in nats of the shares that counts `(..., n_categories)` make."""
    counts = np.clip(counts, 0.0, None)
    return entr(counts / counts.sum(axis=-1, keepdims=True)).sum(axis=-1)
