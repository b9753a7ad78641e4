"""A Gaussian process over coalitions, whose Shapley values have a closed form.

The behavior of a coalition s of k contributors, at u = log((k + 1/2) / (n - k + 1/2)), is modelled as a sum of
independent parts, with z = s - k/n, L(s, s') = (4/n) z.z', H the number of contributors in which s and s' differ, M the
Matern-5/2 kernel and f(k) = (4 (k/n) (1 - k/n))^(-steepness):

    size profile     size M(u, u')                      smooth in the size, common to all contributors
    slopes           f f' (slope + slope_change M) L    credit, which may change with the size and grow at both ends
    pairs            pairs L^2                          interactions of two contributors
    remainder        remainder exp(-decay H / n)        everything else
    prior credit     prior (2 z.p) (2 z'.p)             multiples of a given credit p

and observed with noise, plus misfit misfit f^2 (1 - fraction of the coalitions of that size that were measured).

The part of a Shapley value in which contributors differ, its *contrast*, depends only on the odd part
(v(s) - v(complement of s)) / 2. Where coalitions come in complement pairs the process is therefore fitted to half the
differences (`odd`), and the even part, often most of the variance, never enters.

The kernel, its odd form and the closed form of the Shapley values are this project's own; the general technique is that
of Rasmussen and Williams (2006).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np
import numpy.typing as npt
from scipy.linalg import get_lapack_funcs, solve_triangular
from scipy.optimize import minimize
from scipy.special import comb, gammaln, ndtri

from tribute.errors import FitError
from tribute.games.regression import ContrastEstimate, size_profile
from tribute.types import Behaviors, CoalitionMasks

Array = npt.NDArray[np.float64]

_potrf, _potrs, _potri, _trtri = get_lapack_funcs(("potrf", "potrs", "potri", "trtri"), dtype=np.float64)

MAX_ROWS = 4000
"""Most rows that are fitted: coalitions, or pairs of them. A covariance matrix of them takes 128 MB."""

MAX_TUNING_ROWS = 256
"""Most rows from which hyper-parameters are learned: a dozen numbers need no more."""

N_DRAWS = 33
"""Values of the hyper-parameters over which the estimate is averaged: their mode, and draws in opposite pairs."""

PRIORS: dict[str, tuple[float, float]] = {
    "size": (np.log(0.5), 2.0),
    "size_length": (np.log(2.0), 0.6),
    "slope": (np.log(0.2), 2.0),
    "slope_change": (np.log(0.05), 2.0),
    "slope_length": (np.log(2.0), 0.6),
    "remainder": (np.log(0.05), 2.0),
    "decay": (np.log(2.0), 0.7),
    "noise": (np.log(0.02), 2.0),
    "misfit": (np.log(0.003), 2.0),
    "steepness": (0.3, 0.5),
    "pairs": (np.log(0.05), 2.0),
    "prior": (np.log(0.01), 2.0),
}
"""Mean and sd of the normal prior of each hyper-parameter, on the logarithm; `steepness` itself. For data of unit
variance."""

MEAN_VARIANCE = 4.0
"""Variance of the mean behavior, which is free where coalitions are not paired. For data of unit variance."""

TINY = 1e-10
"""Relative variance below which a response counts as constant, and jitter of a covariance matrix."""


def gaussian_process_contrasts(
    masks: CoalitionMasks,
    behaviors: Behaviors,
    *,
    relative_variances: Array | None = None,
    prior: Array | None = None,
    mode: str | None = None,
) -> ContrastEstimate:
    """Estimate the contrasts of Shapley values by a Gaussian process over coalitions.

    Hyper-parameters have the priors of `PRIORS`. Their posterior is approximated at its mode by a normal distribution,
    from which `N_DRAWS` quasi-random draws are averaged, each with the square root of its posterior over its proposal
    density as weight: the covariance is that of the mixture, so it holds the uncertainty of the hyper-parameters. Order
    and orientation of the rows do not matter.

    Where all `2**n - 2` coalitions were measured nothing is modelled: the contrasts are those of the measured table,
    and the process only tells how noisy they are.

    Args:
        masks: `(n_coalitions, n_contributors)`, distinct, neither empty nor grand.
        behaviors: `(n_coalitions,)`, finite.
        relative_variances: `(n_coalitions,)`, positive: variances of the measurement noise, up to a factor. None:
            equal.
        prior: `(n_contributors,)`, credit by a cheap method, up to a factor of either sign and a shift. Data that
            contradict it switch it off. None, or all equal: none.
        mode: `odd` fits half the differences of complement pairs, `full` all coalitions, None `odd` where every
            coalition has its complement.

    Returns:
        The contrasts; they do not depend on v(empty) and v(grand).

    Raises:
        FitError: `odd` without complete pairs, or more than `MAX_ROWS` rows.
    """
    problem = _pose(masks, behaviors, relative_variances, prior, mode)
    n_coalitions, n_contributors = masks.shape
    if len(problem.response) > MAX_ROWS:
        raise FitError(
            f"Expected at most {MAX_ROWS} coalitions or pairs for the Gaussian process, found {len(problem.response)}. "
            "Use estimator='size_adjusted'."
        )
    if problem.scale == 0.0:
        # Equal behaviors say that credit is equal; a single coalition says nothing.
        unknown = np.nan if n_coalitions == 1 else 0.0
        covariance = np.full((n_contributors, n_contributors), unknown)
        return ContrastEstimate(np.zeros(n_contributors), covariance, unknown, np.nan, _rank(problem))
    tuning = problem.thinned(MAX_TUNING_ROWS)
    draws, log_proposal = _hyper_parameters(tuning)
    fits = [_posterior(problem, theta) for theta in draws]
    if tuning is problem:
        log_density = np.array([fit.log_density for fit in fits])
    else:
        log_density = np.array([_log_density(tuning, theta, *_solved(tuning, theta)[1:]) for theta in draws])
    # Square roots: the exact weights of so few draws would let one or two decide, and be overconfident.
    log_weights = (log_density - log_proposal) / 2.0
    weights = np.exp(log_weights - log_weights.max())
    weights /= weights.sum()
    contrasts = np.array([fit.contrasts for fit in fits])
    mean = weights @ contrasts
    apart = contrasts - mean
    covariance = np.tensordot(weights, [fit.covariance for fit in fits], 1) + (weights[:, None] * apart).T @ apart
    noise_variance = float(weights @ [fit.noise_variance for fit in fits])
    if problem.n_coalitions == 2.0**n_contributors - 2:
        functional = problem.exact_functional()
        mean = functional @ problem.response
        covariance = noise_variance * (functional * problem.relative_noise) @ functional.T
        covariance *= 0.5 if problem.odd else 1.0
    return ContrastEstimate(
        contrasts=problem.scale * mean,
        covariance=problem.scale**2 * covariance,
        noise_sd=problem.scale * float(np.sqrt(noise_variance)),
        loo_r2=problem.explained(_leave_one_out(problem, draws[0])),
        rank=_rank(problem),
    )


def _rank(problem: _Problem) -> int:
    """Number of contrasts that the coalitions identify, and 1 for their sum."""
    return 1 + int(np.linalg.matrix_rank(problem.members))


@dataclass(frozen=True)
class _Problem:
    """What the process is fitted to; rows are sorted by size, then by members.

    Attributes:
        masks: `(n_rows, n_contributors)`; of a pair, the smaller coalition.
        response: `(n_rows,)`, in units of `scale`; half the differences where `odd`, else less their mean.
        relative_noise: `(n_rows,)`, variance of an evaluation over the mean one; of a pair, the mean of both.
        missing: `(n_rows,)`, the fraction of the coalitions of that size that were not measured.
        prior: `(n_contributors,)` of unit length that sums to zero, or None.
        odd: Whether rows are pairs.
        scale: Unit of the response in that of the behavior.
        n_coalitions: Number of coalitions measured, twice the rows where `odd`.
    """

    masks: CoalitionMasks
    response: Array
    relative_noise: Array
    missing: Array
    prior: Array | None
    odd: bool
    scale: float
    n_coalitions: int

    @cached_property
    def sizes(self) -> npt.NDArray[np.intp]:
        return self.masks.sum(axis=1)

    @cached_property
    def members(self) -> Array:
        """z, `(n_rows, n_contributors)`."""
        return self.masks - (self.sizes / self.masks.shape[1])[:, None]

    @cached_property
    def together(self) -> Array:
        """L, `(n_rows, n_rows)`."""
        return 4.0 / self.masks.shape[1] * (self.members @ self.members.T)

    @cached_property
    def together_squared(self) -> Array:
        return self.together**2

    @cached_property
    def distances(self) -> npt.NDArray[np.intp]:
        """H, `(n_rows, n_rows)`."""
        presence = self.masks.astype(np.float64)
        common = np.rint(presence @ presence.T).astype(np.intp)
        return self.sizes[:, None] + self.sizes - 2 * common

    @cached_property
    def size_starts(self) -> npt.NDArray[np.intp]:
        """First row of each distinct size."""
        return np.flatnonzero(np.diff(self.sizes, prepend=-1))

    @cached_property
    def size_numbers(self) -> npt.NDArray[np.intp]:
        """`(n_rows,)`, which of the distinct sizes."""
        return np.cumsum(np.diff(self.sizes, prepend=-1) > 0) - 1

    @cached_property
    def measured_sizes(self) -> npt.NDArray[np.intp]:
        return self.sizes[self.size_starts]

    def by_size(self, matrix: Array) -> Array:
        """Sums of a matrix `(n_rows, n_rows)` over the blocks of equal sizes."""
        return np.add.reduceat(np.add.reduceat(matrix, self.size_starts, 0), self.size_starts, 1)

    def from_sizes(self, blocks: Array) -> Array:
        """The matrix `(n_rows, n_rows)` whose entries depend on the sizes alone."""
        counts = np.diff(self.size_starts, append=len(self.sizes))
        return np.repeat(np.repeat(blocks, counts, 0), counts, 1)

    def thinned(self, n_rows: int) -> _Problem:
        """The same problem with evenly chosen rows, of all sizes therefore."""
        if len(self.response) <= n_rows:
            return self
        rows = np.linspace(0, len(self.response) - 1, n_rows).round().astype(np.intp)
        return replace(
            self,
            masks=self.masks[rows],
            response=self.response[rows],
            relative_noise=self.relative_noise[rows],
            missing=self.missing[rows],
        )

    def exact_functional(self) -> Array:
        """The matrix `(n_contributors, n_rows)` that turns a complete response into contrasts.

        The contrast of a size is the regression on its coalitions alone; all sizes weigh alike.
        """
        n = self.masks.shape[1]
        weights = n / (self.sizes * (n - self.sizes) * comb(n, self.sizes))
        return (2.0 if self.odd else 1.0) * (self.members * weights[:, None]).T

    def explained(self, loo_residuals: Array) -> float:
        """R2 of leave-one-out residuals, of what a smooth profile in the size leaves of the response."""
        n = self.masks.shape[1]
        n_terms = int(np.clip(len(self.response) // 8, 1, min(5, len(self.measured_sizes))))
        profile = size_profile(self.sizes, n, n_terms)
        if self.odd:
            profile = profile - size_profile(n - self.sizes, n, n_terms)
        left = self.response - profile @ np.linalg.lstsq(profile, self.response, rcond=None)[0]
        total = float(left @ left)
        return 1.0 - float(loo_residuals @ loo_residuals) / total if total > TINY * len(left) else np.nan


def _pose(
    masks: CoalitionMasks,
    behaviors: Behaviors,
    relative_variances: Array | None,
    prior: Array | None,
    mode: str | None,
) -> _Problem:
    """Pair, orient, sort and scale the evaluations."""
    n_coalitions, n_contributors = masks.shape
    noise = np.ones(n_coalitions) if relative_variances is None else relative_variances / relative_variances.mean()
    sizes = masks.sum(axis=1)
    _, inverse, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    log_coalitions = gammaln(n_contributors + 1) - gammaln(sizes + 1) - gammaln(n_contributors - sizes + 1)
    missing = np.clip(1.0 - counts[inverse] * np.exp(-log_coalitions), 0.0, 1.0)
    # Of a pair, the smaller coalition, or that of the first contributor, comes first.
    first = (2 * sizes < n_contributors) | ((2 * sizes == n_contributors) & masks[:, 0])
    oriented = np.where(first[:, None], masks, ~masks)
    pairs = np.flatnonzero(np.bincount(np.unique(oriented, axis=0, return_inverse=True)[1].reshape(-1)) == 2)
    complete = 2 * len(pairs) == n_coalitions
    if mode == "odd" and not complete:
        raise FitError(
            f"Expected every coalition together with its complement, found {n_coalitions} coalitions of which "
            f"{2 * len(pairs)} form complete pairs. Measure the missing complements, or use mode='full'."
        )
    odd = complete if mode is None else mode == "odd"
    order = np.lexsort((*masks.T[::-1], sizes))
    behaviors = behaviors - behaviors[order[0]]
    if odd:
        order = order[first[order]]
        key = {row.tobytes(): i for i, row in enumerate(masks)}
        partner = np.array([key[(~masks[i]).tobytes()] for i in order])
        response = (behaviors[order] - behaviors[partner]) / 2.0
        relative_noise = (noise[order] + noise[partner]) / 2.0
        scale = float(np.sqrt(np.mean(response**2)))
    else:
        response = behaviors[order] - behaviors[order].mean()
        relative_noise = noise[order]
        scale = float(response.std())
    if scale <= TINY * float(np.abs(behaviors).max(initial=0.0)):
        scale = 0.0
    direction = None
    if prior is not None:
        centred = prior - prior.mean()
        length = float(np.linalg.norm(centred))
        if length > TINY * float(np.abs(prior).max(initial=0.0)):
            direction = centred / length
    return _Problem(
        masks=masks[order],
        response=response / (scale or 1.0),
        relative_noise=relative_noise,
        missing=missing[order],
        prior=direction,
        odd=odd,
        scale=scale,
        n_coalitions=n_coalitions,
    )


def _matern(distance: Array, length: float) -> tuple[Array, Array]:
    """Matern-5/2 kernel and its derivative with respect to log(length)."""
    scaled = np.sqrt(5.0) * np.abs(distance) / length
    decay = np.exp(-scaled)
    return (1.0 + scaled + scaled**2 / 3.0) * decay, scaled**2 * (1.0 + scaled) / 3.0 * decay


def _log_odds(sizes: npt.NDArray[np.integer], n_contributors: int) -> Array:
    return np.log((sizes + 0.5) / (n_contributors - sizes + 0.5))


def _names(problem: _Problem) -> list[str]:
    """Hyper-parameters that this problem has."""
    left_out = {"pairs"} if problem.odd else set()
    left_out |= {"prior"} if problem.prior is None else set()
    return [name for name in PRIORS if name not in left_out]


def _size_kernel(problem: _Problem, length: float, *, odd_part: bool) -> tuple[Array, Array]:
    """Matern kernel over the measured sizes, in its odd or even form where rows are pairs, and d / d log(length)."""
    u = _log_odds(problem.measured_sizes, problem.masks.shape[1])
    kernel, slope = _matern(u[:, None] - u, length)
    if not problem.odd:
        return kernel, slope
    mirrored, mirrored_slope = _matern(u[:, None] + u, length)
    sign = -1.0 if odd_part else 1.0
    return (kernel + sign * mirrored) / 2.0, (slope + sign * mirrored_slope) / 2.0


def _log_roundness(sizes: npt.NDArray[np.integer], n_contributors: int) -> Array:
    """log(4 (k/n) (1 - k/n)), 0 at half the contributors."""
    share = sizes / n_contributors
    return np.log(4.0 * share * (1.0 - share))


class _Covariance:
    """The covariance matrix of a problem's rows at given hyper-parameters, with what its gradient needs."""

    def __init__(self, problem: _Problem, theta: Array) -> None:
        self.problem = problem
        self.at = dict(zip(_names(problem), theta, strict=True))
        value = {name: np.exp(x) if name != "steepness" else x for name, x in self.at.items()}
        n, numbers = problem.masks.shape[1], problem.size_numbers
        self.value = value
        self.profile, self.profile_slope = _size_kernel(problem, value["size_length"], odd_part=True)
        self.matern, self.matern_slope = _size_kernel(problem, value["slope_length"], odd_part=False)
        log_roundness = _log_roundness(problem.measured_sizes, n)
        self.log_steepness = log_roundness[:, None] + log_roundness
        self.steep = np.exp(-value["steepness"] * self.log_steepness)
        self.slopes = self.steep * (value["slope"] + value["slope_change"] * self.matern)
        hamming = np.arange(n + 1)
        self.fade = np.exp(-value["decay"] * hamming / n)
        self.fade_slope = -value["decay"] * hamming / n * self.fade
        if problem.odd:
            self.fade, self.fade_slope = (
                (self.fade - self.fade[::-1]) / 2.0,
                (self.fade_slope - self.fade_slope[::-1]) / 2.0,
            )
        halves = 0.5 if problem.odd else 1.0
        roundness = log_roundness[numbers]
        self.noise = halves * value["noise"] * problem.relative_noise
        self.misfit = halves * value["misfit"] * np.exp(-2.0 * value["steepness"] * roundness) * problem.missing
        self.roundness = roundness

        self.matrix = problem.from_sizes(self.slopes)
        self.matrix *= problem.together
        self.matrix += problem.from_sizes(value["size"] * self.profile)
        self.matrix += (value["remainder"] * self.fade)[problem.distances]
        if not problem.odd:
            self.matrix += MEAN_VARIANCE + value["pairs"] * problem.together_squared
        if problem.prior is not None:
            along = 2.0 * (problem.members @ problem.prior)
            self.matrix += value["prior"] * np.outer(along, along)
        jitter = TINY * (1.0 + self.matrix.diagonal().max())
        self.matrix[np.diag_indices_from(self.matrix)] += self.noise + self.misfit + jitter

    def gradient(self, outer: Array) -> Array:
        """Half the sums of `outer` times the derivative of the matrix, for each hyper-parameter."""
        problem, value = self.problem, self.value
        plain = problem.by_size(outer)
        weighted = outer * problem.together
        linear = problem.by_size(weighted)
        far = np.bincount(problem.distances.ravel(), outer.ravel(), minlength=len(self.fade))
        diagonal = np.diag(outer)
        change = value["slope_change"] * linear * self.steep
        found = {
            "size": value["size"] * (plain * self.profile).sum(),
            "size_length": value["size"] * (plain * self.profile_slope).sum(),
            "slope": value["slope"] * (linear * self.steep).sum(),
            "slope_change": (change * self.matern).sum(),
            "slope_length": (change * self.matern_slope).sum(),
            "remainder": value["remainder"] * (far @ self.fade),
            "decay": value["remainder"] * (far @ self.fade_slope),
            "noise": diagonal @ self.noise,
            "misfit": diagonal @ self.misfit,
            "steepness": -(linear * self.slopes * self.log_steepness).sum()
            - 2.0 * (diagonal * self.misfit) @ self.roundness,
        }
        if not problem.odd:
            found["pairs"] = value["pairs"] * (outer * problem.together_squared).sum()
        if problem.prior is not None:
            along = 2.0 * (problem.members @ problem.prior)
            found["prior"] = value["prior"] * (along @ outer @ along)
        return 0.5 * np.array([found[name] for name in self.at])


def _log_posterior(problem: _Problem, theta: Array) -> tuple[float, Array]:
    """Log posterior density of the hyper-parameters, up to a constant, and its gradient."""
    centre, spread = _prior(problem)
    covariance = _Covariance(problem, theta)
    # The transpose of a symmetric matrix is itself, in the order of LAPACK, which then need not copy it.
    factor, failed = _potrf(covariance.matrix.T, lower=True, clean=True, overwrite_a=True)
    if failed:
        return -np.inf, np.zeros(len(theta))
    weights = _potrs(factor, problem.response, lower=True)[0]
    density = _log_density(problem, theta, factor, weights)
    inverse = _potri(factor, lower=True, overwrite_c=True)[0].T
    # One triangle alone, the other is zero: all that is summed against it is symmetric.
    outer = np.outer(weights, weights)
    outer[np.diag_indices_from(outer)] += inverse.diagonal()
    inverse *= 2.0
    outer -= inverse
    gradient = covariance.gradient(outer) - (theta - centre) / spread**2
    return density, gradient


def _log_density(problem: _Problem, theta: Array, factor: Array, weights: Array) -> float:
    """Log posterior density from the Cholesky factor and the weights K^-1 y."""
    centre, spread = _prior(problem)
    fit = problem.response @ weights + (((theta - centre) / spread) ** 2).sum()
    return float(-0.5 * fit - np.log(np.diag(factor)).sum())


def _prior(problem: _Problem) -> tuple[Array, Array]:
    """Means and standard deviations of the priors of a problem's hyper-parameters."""
    centre, spread = np.array([PRIORS[name] for name in _names(problem)]).T
    return centre, spread


def _hyper_parameters(problem: _Problem) -> tuple[Array, Array]:
    """Draws `(N_DRAWS, n)` of the hyper-parameters about the mode of their posterior, and their log densities."""
    centre, spread = _prior(problem)

    def loss(theta: Array) -> tuple[float, Array]:
        density, gradient = _log_posterior(problem, theta)
        return (-density, -gradient) if np.isfinite(density) else (1e10, np.zeros(len(theta)))

    bounds = [(m - 6.0 * s, m + 6.0 * s) for m, s in zip(centre, spread, strict=True)]
    found = minimize(loss, centre, jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-8})
    mode, gradient = found.x, found.jac

    # Curvature at the mode, by differences of the gradient; the prior's at least in directions that data leave open.
    step = 1e-3
    curvature = np.array([(loss(ahead)[1] - gradient) / step for ahead in mode + step * np.eye(len(mode))])
    scaled = spread[:, None] * (curvature + curvature.T) / 2.0 * spread
    strength, axes = np.linalg.eigh(scaled)
    root = spread[:, None] * axes / np.sqrt(np.maximum(strength, 0.5))
    normal = _normal_draws(len(mode))
    return mode + normal @ root.T, -0.5 * (normal**2).sum(axis=1)


@cache
def _normal_draws(n_dimensions: int) -> Array:
    """The centre, and quasi-random standard normal draws in opposite pairs: `(N_DRAWS, n_dimensions)`."""
    half = ndtri(_halton(N_DRAWS // 2 + 1, n_dimensions)[1:])
    return np.concatenate([np.zeros((1, n_dimensions)), half, -half])


def _halton(n_points: int, n_dimensions: int) -> Array:
    """The first points `(n_points, n_dimensions)` of the Halton sequence in (0, 1), beginning with 0.

    Those of `scipy.stats.qmc.Halton(scramble=False)`, without the third of a second that importing it takes.
    """
    bases = [k for k in range(2, 100) if all(k % divisor for divisor in range(2, k))][:n_dimensions]
    points = np.zeros((n_points, n_dimensions))
    for column, base in enumerate(bases):
        left, unit = np.arange(n_points), 1.0
        while left.any():
            unit /= base
            points[:, column] += (left % base) * unit
            left //= base
    return points


@dataclass(frozen=True)
class _Posterior:
    """Contrasts at given hyper-parameters, in units of the problem's scale."""

    contrasts: Array
    covariance: Array
    noise_variance: float
    log_density: float


def _posterior(problem: _Problem, theta: Array) -> _Posterior:
    """Posterior mean and covariance of the contrasts: a linear functional of the process."""
    covariance, factor, weights = _solved(problem, theta)
    cross, before = _functional(problem, covariance.value)
    reduced = solve_triangular(factor, cross, lower=True, check_finite=False)
    return _Posterior(
        contrasts=cross.T @ weights,
        covariance=before - reduced.T @ reduced,
        noise_variance=(2.0 if problem.odd else 1.0) * float(np.mean(covariance.noise + covariance.misfit)),
        log_density=_log_density(problem, theta, factor, weights),
    )


def _leave_one_out(problem: _Problem, theta: Array) -> Array:
    """Residuals `(n_rows,)` of predictions from all other rows (Rasmussen and Williams 2006, section 5.4.2)."""
    _, factor, weights = _solved(problem, theta)
    return weights / (_trtri(factor, lower=True)[0] ** 2).sum(axis=0)


def _solved(problem: _Problem, theta: Array) -> tuple[_Covariance, Array, Array]:
    """The covariance K of the rows, its Cholesky factor, and the weights K^-1 y."""
    covariance = _Covariance(problem, theta)
    factor, failed = _potrf(covariance.matrix.T, lower=True, clean=True, overwrite_a=True)
    if failed:
        raise FitError(
            "Expected coalitions whose covariance is positive definite, found one that is not to rounding. "
            "Use estimator='size_adjusted'."
        )
    return covariance, factor, _potrs(factor, problem.response, lower=True)[0]


@cache
def _memberships() -> tuple[Array, Array]:
    """Nodes and weights of the Gauss-Legendre rule on (0, 1)."""
    nodes, weights = np.polynomial.legendre.leggauss(48)
    return (nodes + 1.0) / 2.0, weights / 2.0


def _functional(problem: _Problem, value: dict[str, float]) -> tuple[Array, Array]:
    """Covariance of the rows with the contrasts `(n_rows, n_contributors)`, and of the contrasts before any data.

    A contrast is the mean over the sizes 1 to n - 1 of the credit at that size, as the Shapley law weighs every size
    times its information alike. The remainder enters by the average over independent memberships with probability q,
    q uniform in (0, 1).
    """
    n = problem.masks.shape[1]
    all_sizes = np.arange(1, n)
    u_all, u = _log_odds(all_sizes, n), _log_odds(problem.measured_sizes, n)
    steep_all = np.exp(-value["steepness"] * _log_roundness(all_sizes, n))
    steep = np.exp(-value["steepness"] * _log_roundness(problem.measured_sizes, n))
    between = _matern(u[:, None] - u_all, value["slope_length"])[0]
    per_size = (
        4.0 / n * steep * (value["slope"] * steep_all.mean() + value["slope_change"] * (between @ steep_all) / (n - 1))
    )
    change = _matern(u_all[:, None] - u_all, value["slope_length"])[0]
    own = (
        4.0
        / n
        * (
            value["slope"] * steep_all.mean() ** 2
            + value["slope_change"] * (steep_all @ change @ steep_all) / (n - 1) ** 2
        )
    )

    keep = np.exp(-value["decay"] / n)
    q, node_weights = _memberships()
    present, absent = np.log(q + (1.0 - q) * keep), np.log(q * keep + 1.0 - q)
    k = problem.measured_sizes[:, None]
    average = np.exp((k - 1) * present + (n - k) * absent) + np.exp(k * present + (n - k - 1) * absent)
    per_size = per_size + value["remainder"] * (1.0 - keep) * (average @ node_weights)
    agree = np.outer(q, q) + np.outer(1.0 - q, 1.0 - q)
    agree += keep * (1.0 - agree)
    own_term = 2.0 * (1.0 - keep) * agree ** (n - 1)
    cross_term = (1.0 - keep) ** 2 * np.outer(2.0 * q - 1.0, 2.0 * q - 1.0) * agree ** (n - 2)
    own += value["remainder"] * float(node_weights @ (own_term - cross_term) @ node_weights)

    cross = problem.members * per_size[problem.size_numbers][:, None]
    before = own * (np.eye(n) - 1.0 / n)
    if problem.prior is not None:
        cross = cross + 4.0 * value["prior"] * np.outer(problem.members @ problem.prior, problem.prior)
        before = before + 4.0 * value["prior"] * np.outer(problem.prior, problem.prior)
    return cross, before
