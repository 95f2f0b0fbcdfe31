"""The path of a discrete chain: its table, what is between its steps, and chains that it cannot be."""

import math
from itertools import pairwise

import pytest
import torch

from genmodels.diffusion.discrete import Discrete
from genmodels.diffusion.schedules import VariancePreserving
from genmodels.registry import ConfigError

CHAINS = (
    ({}, {}),
    (
        {"betas": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ),
    ({"betas": "squaredcos_cap_v2"}, {"beta_schedule": "squaredcos_cap_v2"}),
    ({"zero_terminal_snr": True}, {"rescale_betas_zero_snr": True}),
    ({"steps": 40}, {"num_train_timesteps": 40}),
)


def test_steps_are_those_of_diffusers():
    """Named chains to the float32 of its table; a given table to the last bits of float64."""
    from diffusers import DDIMScheduler

    for ours, theirs in CHAINS:
        table = DDIMScheduler(**theirs).alphas_cumprod.double()
        path = Discrete(**ours)
        alpha, sigma = path.scales(path.at(torch.arange(len(table))))
        torch.testing.assert_close(alpha.square(), table, rtol=2e-5, atol=1e-9)
        torch.testing.assert_close(sigma.square(), 1 - table, rtol=0, atol=1e-6)
        given = Discrete(alphas_cumprod=tuple(table.tolist()))
        alpha, sigma = given.scales(given.at(torch.arange(len(table))))
        torch.testing.assert_close(alpha.square(), table, rtol=1e-12, atol=0)
        torch.testing.assert_close(sigma.square(), 1 - table, rtol=1e-12, atol=0)


def test_between_the_steps_it_is_smooth_and_falls():
    for options, _ in CHAINS:
        path = Discrete(**options)
        t = torch.linspace(path.t_min, 1, 10_001, dtype=torch.float64)[:-1]
        assert (path.log_snr(t).diff() < 0).all()
        # the slope from the left of every step is that from its right
        steps = path.at(torch.arange(path.steps - 1)).double()
        left, right = path(steps - 1e-9), path(steps + 1e-9)
        torch.testing.assert_close(left.dsigma, right.dsigma, rtol=2e-4, atol=1e-6)
        torch.testing.assert_close(left.dalpha, right.dalpha, rtol=2e-4, atol=1e-6)


def test_a_finer_chain_of_the_vp_process_tends_to_it():
    """β_k = 1 - ᾱ(t_k)/ᾱ(t_{k-1}): between steps the cubic is right to 1/N² away from the data, and exact at them."""
    vp, t = VariancePreserving(), torch.linspace(0.1, 0.99, 500, dtype=torch.float64)
    errors = []
    for n in (50, 100, 200):
        table = vp.scales((torch.arange(n, dtype=torch.float64) + 1) / n)[0].square()
        errors.append((Discrete(alphas_cumprod=tuple(table.tolist())).log_snr(t) - vp.log_snr(t)).abs().max().item())
    assert errors[0] < 5e-3 and all(math.log2(a / b) > 1.7 for a, b in pairwise(errors))


def test_ends():
    """Clean at 0, noise alone at 1 where the chain ends without signal; a trained start is the first step."""
    path = Discrete(zero_terminal_snr=True)
    ends = path.scales(torch.tensor([0.0, 1.0]))
    assert torch.equal(torch.stack(ends), torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64))
    last = path(torch.tensor(1.0))
    assert last.dalpha < 0 and last.dsigma == 0 and path.log_snr(torch.tensor(1.0)) == -math.inf
    assert float(path.time(torch.tensor(-math.inf))) == 1
    trained = Discrete(start="trained")
    assert (
        trained.t_min == 1e-3
        and abs(trained.scales(torch.tensor(1e-3, dtype=torch.float64))[1].square() - 1e-4) < 1e-14
    )
    # before the first step: constant rate
    half = Discrete().scales(torch.tensor(5e-4, dtype=torch.float64))[0]
    assert abs(half**4 - (1 - 1e-4)) < 1e-15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1}, "at least 2 steps are needed, found 1"),
        ({"alphas_cumprod": (0.9, 0.95, 0.1)}, r"are needed, found 0\.9, 0\.95, 0\.1"),
        ({"alphas_cumprod": (1.0, 0.5)}, "1 > ᾱ_0"),
        ({"alphas_cumprod": (0.5, 0.0, 0.0)}, "1 > ᾱ_0"),
        ({"beta_end": 1.5}, "Every β must lie between 0 and 1"),
    ],
)
def test_chains_that_it_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        Discrete(**options)
