"""Autocorrelation times, effective sizes and split R̂, against autoregressive chains and another formulation."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.signal import lfilter

from genmodels.autocorrelation import autocorrelation, autocorrelation_time
from genmodels.rng import generator
from genmodels.wavelet.mixing import decay_time, effective_size, split_r_hat


def autoregressive(phi: float, length: int, *batch: int, key: str = "a") -> torch.Tensor:
    """[T, *batch] stationary: x_t = φ x_{t-1} + √(1-φ²) ξ_t, with ρ(t) = φ^t and τ = (1+φ)/(1-φ)."""
    xi = torch.randn(length, *batch, generator=generator("mixing", key), dtype=torch.float64)
    xi[1:] *= math.sqrt(1 - phi**2)
    return torch.tensor(lfilter([1.0], [1.0, -phi], xi.numpy(), axis=0))


def test_the_autocorrelation_is_that_of_its_definition():
    """Sums over pairs written out; of two observables at once, about the mean of all chains or of each."""
    x = autoregressive(0.7, 37, 3, 2) + torch.tensor([5.0, -2.0])
    for one_law in (True, False):
        centred = x - (x.mean((0, 1)) if one_law else x.mean(0))
        covariance = torch.stack([(centred[: 37 - t] * centred[t:]).mean((0, 1)) for t in range(37)])
        torch.testing.assert_close(autocorrelation(x, one_law=one_law), covariance / covariance[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
def test_the_time_and_its_error_are_those_of_autoregressive_chains(phi):
    """Over 150 traces: τ = (1+φ)/(1-φ) without bias beyond the window's e^{-5}, and scattered as the error says."""
    length, chains, traces = 1000, 4, 150
    found = autocorrelation_time(autoregressive(phi, length, chains, traces, key=str(phi)))
    exact = (1 + phi) / (1 - phi)
    scatter = float(found.tau.std())
    # the mean of all is estimated, too, which takes of the order of 10 τ²/(T B) where the window is of 5 τ
    assert float(found.tau.mean()) == pytest.approx(exact, abs=4 * scatter / traces**0.5 + 0.02 * exact)
    assert float(found.stderr.mean()) == pytest.approx(scatter, rel=0.2)
    assert (found.window >= 5 * found.tau.clamp(min=1)).all() and found.window.float().mean() < 5 * exact + 3
    sizes = effective_size(autoregressive(phi, length, chains, traces, key=str(phi)))
    torch.testing.assert_close(sizes, length * chains / found.tau)


def test_antithetic_chains_are_worth_more_than_independent_ones():
    """φ = -½: τ = 1/3, but for the (-½)^5/3 beyond the window of 5."""
    found = autocorrelation_time(autoregressive(-0.5, 20_000, 4))
    assert int(found.window) == 5
    assert float(found.tau) == pytest.approx(1 + 2 * sum((-0.5) ** t for t in range(1, 6)), abs=4 * float(found.stderr))
    assert float(effective_size(autoregressive(-0.5, 20_000, 4))) > 2 * 80_000


def test_the_decay_time_of_an_exponential_is_between_lags():
    """-1/log φ: of a trace whose ρ is φ^t to within its noise, and of ones that reach below zero at once."""
    for phi in (0.3, 0.8, 0.95):
        traces = decay_time(autoregressive(phi, 2000, 8, 100, key=f"decay {phi}"))
        error = float(traces.std()) / 10
        assert float(traces.mean()) == pytest.approx(-1 / math.log(phi), abs=4 * error + 0.01 / -math.log(phi))
    flips = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(50)[:, None]
    assert float(decay_time(flips)) == pytest.approx((1 - math.exp(-1)) / 2, abs=1e-12)  # from 1 to -1: a straight line


def test_chains_that_never_decorrelate():
    """Each stuck at a place of its own: correlated for ever if they have one law, constants if each has its own."""
    stuck = torch.arange(4.0).expand(50, 4)
    found = autocorrelation_time(stuck)
    assert float(found.tau) == pytest.approx(99, abs=1e-9) and float(found.stderr) == math.inf
    assert float(decay_time(stuck)) == math.inf
    own = autocorrelation_time(stuck, one_law=False)
    assert own.tau.isnan() and own.stderr.isnan() and decay_time(stuck, one_law=False).isnan()


def test_laws_of_their_own_are_judged_by_their_own_means():
    x = autoregressive(0.6, 4000, 8) + 10 * torch.arange(8)
    found = autocorrelation_time(x, one_law=False)
    assert float(found.tau) == pytest.approx(4, abs=4 * float(found.stderr)) and float(found.stderr) < 0.2
    assert float(autocorrelation_time(x).tau) > 1000


# ---- split R̂ ---


def by_definition(x: np.ndarray) -> float:
    """Rank-normalised split R̂, written out with scipy's ranks."""
    half = len(x) // 2
    x = np.concatenate((x[:half], x[-half:]), 1)
    out = []
    for values in (x, np.abs(x - np.median(x))):
        z = stats.norm.ppf((stats.rankdata(values).reshape(x.shape) - 3 / 8) / (x.size + 1 / 4))
        within = z.var(0, ddof=1).mean()
        between = half * z.mean(0).var(ddof=1)
        out.append(math.sqrt(((half - 1) / half * within + between / half) / within))
    return max(out)


def test_split_r_hat_is_that_of_its_definition():
    """Of an odd number of states, with ties, heavy tails, and several observables."""
    x = autoregressive(0.5, 101, 4, 3)
    x = torch.stack((x[..., 0], x[..., 1].mul(2).round(), torch.tan(x[..., 2])), -1)
    assert split_r_hat(x).tolist() == pytest.approx([by_definition(x[..., k].numpy()) for k in range(3)], abs=1e-12)


def test_split_r_hat_sees_places_spreads_and_drifts():
    same = autoregressive(0.3, 1000, 4, 50)
    assert (split_r_hat(same) < 1.01).all() and float(split_r_hat(same).mean()) == pytest.approx(1.0, abs=0.003)
    x = autoregressive(0.3, 1000, 4)
    one = torch.tensor([0.0, 0.0, 0.0, 1.0])
    drift = torch.linspace(-1, 1, 1000)[:, None]
    assert (
        float(split_r_hat(x + one)) > 1.05 < float(split_r_hat(x * (1 + one))) and float(split_r_hat(x + drift)) > 1.05
    )
    # eight halves, two of them moved by 1: means and variances of the pooled law's normal scores, by quadrature
    far = autoregressive(0.0, 20_000, 4, key="shifted") + one
    z = stats.norm
    grid = np.linspace(-8, 9, 20_001)
    pooled = 0.75 * z.cdf(grid) + 0.25 * z.cdf(grid - 1)
    score = z.ppf(np.clip(pooled, 1e-15, 1 - 1e-15))
    means = [np.trapezoid(score * z.pdf(grid - s), grid) for s in (0, 1)]
    squares = [np.trapezoid(score**2 * z.pdf(grid - s), grid) for s in (0, 1)]
    variances = [q - m**2 for q, m in zip(squares, means, strict=True)]
    between = (6 * (means[0] ** 2) + 2 * means[1] ** 2 - 8 * (0.75 * means[0] + 0.25 * means[1]) ** 2) / 7
    exact = math.sqrt(1 + between / (0.75 * variances[0] + 0.25 * variances[1]))
    assert exact > 1.05 and float(split_r_hat(far)) == pytest.approx(exact, abs=0.004)


def test_constants_have_neither_times_nor_r_hat():
    """Also where the mean of equal numbers is not quite that number."""
    x = torch.full((20, 3), 0.7, dtype=torch.float64)
    assert (x - x.mean() != 0).all()
    assert split_r_hat(x).isnan() and autocorrelation(x).isnan().all() and autocorrelation_time(x).tau.isnan()


@pytest.mark.parametrize("measure", [autocorrelation, autocorrelation_time, decay_time, effective_size, split_r_hat])
def test_traces_are_checked(measure):
    with pytest.raises(ValueError, match=r"a trace \[T, B, \*\] of at least . states of at least 1 chains .*\[1, 3\]"):
        measure(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="not finite"):
        measure(torch.full((10, 3), math.nan))
