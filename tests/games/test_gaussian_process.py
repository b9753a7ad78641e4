"""The Gaussian process over coalitions: its closed forms against enumeration, its laws, its calibration."""

from __future__ import annotations

import re

import numpy as np
import pytest
from scipy.stats import qmc

from tribute.errors import FitError
from tribute.games import gaussian_process as gp
from tribute.games.coalitions import all_coalitions, complements
from tribute.games.designs import draw_design
from tribute.games.exact import exact_shapley_from_table
from tribute.games.gaussian_process import gaussian_process_contrasts

N = 5


def centred(values: np.ndarray) -> np.ndarray:
    return values - values.mean()


def saturation(masks: np.ndarray, seed: int = 0) -> np.ndarray:
    worth = np.random.default_rng(seed).gamma(1.0, size=masks.shape[1])
    return 1.0 - np.exp(-3.0 * masks @ worth / worth.sum())


def some_pairs(n_contributors: int, n_pairs: int, seed: int = 0) -> np.ndarray:
    """Distinct pairs, every coalition next to its complement."""
    rng = np.random.default_rng(seed)
    proper = all_coalitions(n_contributors, include_empty=False, include_grand=False)
    half = proper[: len(proper) // 2][rng.permutation(len(proper) // 2)[:n_pairs]]
    return np.stack([half, complements(half)], axis=1).reshape(-1, n_contributors)


def pose(mode: str, prior: np.ndarray | None, seed: int = 0) -> tuple[gp._Problem, np.ndarray]:
    """A small problem and hyper-parameters near the middle of their priors."""
    rng = np.random.default_rng(seed)
    masks = some_pairs(N, 9, seed)
    problem = gp._pose(masks, rng.normal(size=len(masks)), rng.uniform(0.5, 2.0, len(masks)), prior, mode)
    names = gp._names(problem)
    centre = np.array([gp.PRIORS[name][0] for name in names])
    return problem, centre + 0.5 * rng.normal(size=len(centre))


def table_covariance(problem: gp._Problem, theta: np.ndarray) -> np.ndarray:
    """The covariance of the process over all coalitions, written out from its definition."""
    value = {name: x if name == "steepness" else np.exp(x) for name, x in zip(gp._names(problem), theta, strict=True)}
    masks = all_coalitions(N)
    size = masks.sum(axis=1)
    z = masks - size[:, None] / N
    together = 4.0 / N * z @ z.T
    apart = (masks[:, None] != masks).sum(axis=2)
    u = np.log((size + 0.5) / (N - size + 0.5))
    roundness = np.where((size > 0) & (size < N), 4.0 * size / N * (1.0 - size / N), 1.0)
    steep = roundness ** -value["steepness"]

    def matern(length: float) -> np.ndarray:
        d = np.sqrt(5.0) * np.abs(u[:, None] - u) / length
        return (1.0 + d + d**2 / 3.0) * np.exp(-d)

    slopes = value["slope"] + value["slope_change"] * matern(value["slope_length"])
    covariance = np.outer(steep, steep) * slopes * together
    covariance += value["remainder"] * np.exp(-value["decay"] * apart / N)
    covariance += value["size"] * matern(value["size_length"])
    if not problem.odd:
        covariance += value["pairs"] * together**2
    if problem.prior is not None:
        along = 2.0 * z @ problem.prior
        covariance += value["prior"] * np.outer(along, along)
    return covariance


def observation(problem: gp._Problem) -> np.ndarray:
    """The matrix `(n_rows, 2**N)` that turns a table of values into the rows of a problem."""
    rows = np.arange(len(problem.response))
    at = problem.masks @ (1 << np.arange(N))
    matrix = np.zeros((len(rows), 2**N))
    matrix[rows, at] = 1.0
    if problem.odd:
        matrix[rows, at] = 0.5
        matrix[rows, 2**N - 1 - at] = -0.5
    return matrix


PRIOR = np.array([3.0, -1.0, 0.5, 0.0, 2.0])


@pytest.mark.parametrize("prior", [None, PRIOR])
@pytest.mark.parametrize("mode", ["odd", "full"])
def test_rows_have_the_covariance_of_the_definition(mode: str, prior: np.ndarray | None) -> None:
    problem, theta = pose(mode, prior)
    rows = observation(problem)
    expected = rows @ table_covariance(problem, theta) @ rows.T + (0.0 if problem.odd else 4.0)
    difference = gp._Covariance(problem, theta).matrix - expected
    noise = np.diag(difference)
    assert np.abs(difference - np.diag(noise)).max() < 1e-12
    assert (noise > 0).all()


@pytest.mark.parametrize("prior", [None, PRIOR])
@pytest.mark.parametrize("mode", ["odd", "full"])
def test_contrasts_are_the_shapley_functional_of_the_process(mode: str, prior: np.ndarray | None) -> None:
    problem, theta = pose(mode, prior)
    shapley = np.array([centred(exact_shapley_from_table(row)) for row in np.eye(2**N)]).T
    covariance = table_covariance(problem, theta)
    cross, before = gp._functional(problem, gp._Covariance(problem, theta).value)
    np.testing.assert_allclose(cross, observation(problem) @ covariance @ shapley.T, atol=1e-12)
    np.testing.assert_allclose(before, shapley @ covariance @ shapley.T, atol=1e-12)


@pytest.mark.parametrize("prior", [None, PRIOR])
@pytest.mark.parametrize("mode", ["odd", "full"])
def test_the_gradient_is_the_slope_of_the_posterior(mode: str, prior: np.ndarray | None) -> None:
    problem, theta = pose(mode, prior)

    def density(at: np.ndarray) -> float:
        return gp._log_posterior(problem, at)[0]

    step = 1e-5 * np.eye(len(theta))
    slope = [(density(theta + d) - density(theta - d)) / 2e-5 for d in step]
    np.testing.assert_allclose(gp._log_posterior(problem, theta)[1], slope, atol=1e-6)


@pytest.mark.parametrize("mode", ["odd", "full"])
def test_leave_one_out_residuals_are_those_of_fits_without_the_row(mode: str) -> None:
    problem, theta = pose(mode, None)
    found = gp._leave_one_out(problem, theta)
    matrix = gp._Covariance(problem, theta).matrix
    for i in range(len(problem.response)):
        others = np.arange(len(problem.response)) != i
        predicted = matrix[i, others] @ np.linalg.solve(matrix[np.ix_(others, others)], problem.response[others])
        assert found[i] == pytest.approx(problem.response[i] - predicted, abs=1e-9)


@pytest.mark.parametrize("mode", ["odd", "full"])
@pytest.mark.parametrize("n_contributors", [2, 3, 4, 5, 6])
def test_all_coalitions_give_the_enumerated_values(n_contributors: int, mode: str) -> None:
    table = np.random.default_rng(n_contributors).normal(size=2**n_contributors)
    masks = all_coalitions(n_contributors, include_empty=False, include_grand=False)
    order = np.random.default_rng(1).permutation(len(masks))
    found = gaussian_process_contrasts(masks[order], table[1:-1][order], mode=mode)
    np.testing.assert_allclose(found.contrasts, centred(exact_shapley_from_table(table)), atol=1e-8)


@pytest.mark.parametrize("mode", ["odd", "full"])
def test_order_and_orientation_do_not_matter(mode: str) -> None:
    masks = some_pairs(6, 12)
    y = saturation(masks)
    variances = np.random.default_rng(0).uniform(1.0, 2.0, len(y))
    order = np.random.default_rng(1).permutation(len(y))
    first = gaussian_process_contrasts(masks, y, relative_variances=variances, mode=mode)
    second = gaussian_process_contrasts(masks[order], y[order], relative_variances=variances[order], mode=mode)
    np.testing.assert_array_equal(first.contrasts, second.contrasts)
    np.testing.assert_array_equal(first.covariance, second.covariance)


@pytest.mark.parametrize("mode", ["odd", "full"])
@pytest.mark.parametrize(("factor", "shift"), [(1e6, 0.0), (1e-9, 1e-9), (-1.0, 5.0), (2.0, -100.0)])
def test_the_unit_of_the_behavior_does_not_matter(factor: float, shift: float, mode: str) -> None:
    masks = draw_design("orthogonal", 7, 24)
    y = saturation(masks) + 0.01 * np.random.default_rng(0).normal(size=len(masks))
    first = gaussian_process_contrasts(masks, y, mode=mode)
    second = gaussian_process_contrasts(masks, factor * y + shift, mode=mode)
    scale = np.abs(first.contrasts).max()
    np.testing.assert_allclose(second.contrasts / factor, first.contrasts, atol=1e-4 * scale)
    np.testing.assert_allclose(second.covariance / factor**2, first.covariance, atol=1e-3 * first.covariance.max())
    assert second.noise_sd == pytest.approx(abs(factor) * first.noise_sd, rel=0.02)
    assert second.loo_r2 == pytest.approx(first.loo_r2, abs=1e-3)


def test_contributors_are_interchangeable() -> None:
    masks = draw_design("orthogonal", 7, 28)
    y = saturation(masks)
    order = np.random.default_rng(2).permutation(7)
    first = gaussian_process_contrasts(masks, y)
    second = gaussian_process_contrasts(masks[:, order], y)
    np.testing.assert_allclose(second.contrasts, first.contrasts[order], atol=1e-4)
    np.testing.assert_allclose(second.covariance, first.covariance[np.ix_(order, order)], atol=1e-6)


def test_what_a_pair_shares_does_not_matter() -> None:
    """Any function that a coalition and its complement have in common leaves the odd part alone."""
    masks = some_pairs(6, 12)
    shared = np.repeat(np.random.default_rng(3).normal(size=12), 2)
    first = gaussian_process_contrasts(masks, saturation(masks))
    second = gaussian_process_contrasts(masks, saturation(masks) + 10.0 * shared)
    np.testing.assert_allclose(second.contrasts, first.contrasts, atol=1e-5)


@pytest.mark.parametrize("mode", ["odd", "full"])
def test_contrasts_and_their_covariance_sum_to_zero(mode: str) -> None:
    masks = draw_design("orthogonal", 8, 10)  # fewer pairs than contributors
    found = gaussian_process_contrasts(masks, saturation(masks), mode=mode)
    assert found.contrasts.sum() == pytest.approx(0.0, abs=1e-12)
    np.testing.assert_allclose(found.covariance.sum(axis=0), 0.0, atol=1e-12)
    np.testing.assert_allclose(found.covariance, found.covariance.T, atol=1e-15)
    assert np.linalg.eigvalsh(found.covariance).min() > -1e-12
    assert found.rank <= 6


def test_pairs_are_recognised() -> None:
    masks = some_pairs(6, 12)
    y = saturation(masks)
    odd, chosen, full = (gaussian_process_contrasts(masks, y, mode=mode).contrasts for mode in ("odd", None, "full"))
    np.testing.assert_array_equal(odd, chosen)
    assert not np.array_equal(odd, full)
    without_one = gaussian_process_contrasts(masks[1:], y[1:])
    np.testing.assert_array_equal(
        without_one.contrasts, gaussian_process_contrasts(masks[1:], y[1:], mode="full").contrasts
    )
    with pytest.raises(FitError, match=re.escape("23 coalitions of which 22 form complete pairs")):
        gaussian_process_contrasts(masks[1:], y[1:], mode="odd")


@pytest.mark.parametrize("mode", ["odd", "full"])
def test_a_constant_behavior_has_equal_credit(mode: str) -> None:
    masks = draw_design("orthogonal", 6, 12)
    found = gaussian_process_contrasts(masks, np.full(12, 0.1 + 0.2), mode=mode)
    assert not found.contrasts.any()
    assert not found.covariance.any()
    assert np.isnan(found.loo_r2)


def test_a_single_coalition_says_nothing() -> None:
    found = gaussian_process_contrasts(np.array([[True, False, False]]), np.array([3.0]))
    assert not found.contrasts.any()
    assert np.isnan(found.covariance).all()


def test_the_same_data_give_the_same_bits() -> None:
    masks = draw_design("orthogonal", 9, 40)
    first, second = (gaussian_process_contrasts(masks, saturation(masks)) for _ in range(2))
    np.testing.assert_array_equal(first.contrasts, second.contrasts)
    np.testing.assert_array_equal(first.covariance, second.covariance)


def test_known_noise_counts() -> None:
    """Evaluations that are a thousand times noisier hardly count."""
    masks = draw_design("orthogonal", 6, 24)
    y = saturation(masks)
    rng = np.random.default_rng(0)
    wrong = y + np.where(np.arange(24) // 2 % 3 == 0, rng.normal(size=24), 0.0)
    variances = np.where(np.arange(24) // 2 % 3 == 0, 1e3, 1e-3)
    truth = centred(
        gaussian_process_contrasts(
            draw_design("orthogonal", 6, 62), saturation(draw_design("orthogonal", 6, 62))
        ).contrasts
    )
    known = gaussian_process_contrasts(masks, wrong, relative_variances=variances).contrasts
    unknown = gaussian_process_contrasts(masks, wrong).contrasts
    assert np.linalg.norm(known - truth) < 0.3 * np.linalg.norm(unknown - truth)


def relative_errors(prior_of: object, n_coalitions: int = 20, n_seeds: int = 10) -> np.ndarray:
    """Errors of the contrasts over games, without and with a prior credit."""
    errors = []
    for seed in range(n_seeds):
        rng = np.random.default_rng(seed)
        truth = centred(exact_shapley_from_table(saturation(all_coalitions(10), seed)))
        masks = draw_design("orthogonal", 10, n_coalitions, seed=seed)
        y = saturation(masks, seed) + 0.01 * rng.normal(size=len(masks))
        prior = prior_of(rng, truth)  # type: ignore[operator]
        fits = [gaussian_process_contrasts(masks, y, prior=p).contrasts for p in (None, prior)]
        errors.append([np.linalg.norm(fit - truth) / np.linalg.norm(truth) for fit in fits])
    return np.array(errors).T


@pytest.mark.parametrize("n_coalitions", [10, 20])
def test_a_useless_prior_costs_little(n_coalitions: int) -> None:
    without, useless = relative_errors(lambda rng, truth: rng.normal(size=len(truth)), n_coalitions)
    assert useless.mean() < 1.05 * without.mean()


def test_a_good_prior_saves_coalitions() -> None:
    without, good = relative_errors(
        lambda rng, truth: -3.0 * truth + 0.2 * truth.std() * rng.normal(size=len(truth)) + 7.0
    )
    assert good.mean() < 0.6 * without.mean()


def test_intervals_hold_the_truth() -> None:
    """Coverage of the 95 % intervals over games and seeds; the benchmark measures it in breadth."""
    inside, n_contributors = [], 8
    for seed in range(12):
        rng = np.random.default_rng(seed)
        truth = centred(exact_shapley_from_table(saturation(all_coalitions(n_contributors), seed)))
        masks = draw_design("orthogonal", n_contributors, 32, seed=seed)
        found = gaussian_process_contrasts(masks, saturation(masks, seed) + 0.02 * rng.normal(size=32))
        inside.append(np.abs(found.contrasts - truth) <= 1.96 * np.sqrt(np.diag(found.covariance)))
    assert 0.87 < np.mean(inside) <= 1.0
    assert not np.all(inside)


def test_too_many_rows_are_refused() -> None:
    masks = np.random.default_rng(0).random((gp.MAX_ROWS + 1, 64)) < 0.5
    with pytest.raises(FitError, match="size_adjusted"):
        gaussian_process_contrasts(masks, np.arange(float(len(masks))))


@pytest.mark.parametrize("mode", ["odd", "full"])
def test_the_effective_noise_is_that_of_one_evaluation(mode: str) -> None:
    masks = draw_design("orthogonal", 8, 160)
    rng = np.random.default_rng(5)
    y = masks @ rng.normal(size=8) + 0.3 * rng.normal(size=len(masks))
    assert gaussian_process_contrasts(masks, y, mode=mode).noise_sd == pytest.approx(0.3, rel=0.2)


def test_the_estimate_is_the_mixture_over_hyper_parameters() -> None:
    """Moments of draws from the mixture, whose weights are the roots of posterior over proposal density."""
    masks = draw_design("orthogonal", 6, 14)
    y = saturation(masks) + 0.05 * np.random.default_rng(0).normal(size=len(masks))
    found = gaussian_process_contrasts(masks, y)
    problem = gp._pose(masks, y, None, None, None)
    draws, log_proposal = gp._hyper_parameters(problem)
    ratio = np.array([gp._log_posterior(problem, theta)[0] for theta in draws]) - log_proposal
    weights = np.exp((ratio - ratio.max()) / 2.0)
    weights /= weights.sum()
    assert weights.max() > 2.0 * weights.min()  # else this tells nothing of the weights
    rng = np.random.default_rng(1)
    sample = []
    for theta, n in zip(draws, rng.multinomial(200_000, weights), strict=True):
        part = gp._posterior(problem, theta)
        sample.append(rng.multivariate_normal(part.contrasts, part.covariance, size=n, method="eigh"))
    drawn = problem.scale * np.concatenate(sample)
    np.testing.assert_allclose(drawn.mean(axis=0), found.contrasts, atol=5e-3 * np.abs(found.contrasts).max())
    np.testing.assert_allclose(np.cov(drawn.T), found.covariance, atol=0.01 * found.covariance.max())


def test_the_halton_sequence_is_that_of_scipy() -> None:
    for n_dimensions in (1, 5, len(gp.PRIORS)):
        expected = qmc.Halton(n_dimensions, scramble=False).random(gp.N_DRAWS)
        assert np.array_equal(gp._halton(gp.N_DRAWS, n_dimensions), expected)
