"""The lattice φ⁴ model against quadrature, exact identities and published values; its chains, density and cache."""

import math
from functools import cache, partial

import pytest
import torch
from torch import Tensor

from genmodels.data import phi4, phi4_lattice
from genmodels.data.image_cache import CacheWarning
from genmodels.data.phi4 import Phi4
from genmodels.data.phi4_lattice import (
    binder,
    bond,
    bonds_on_the_way,
    chains,
    colours,
    energy,
    force,
    mixing,
    site_normalizer,
    start,
    sweep,
    sweeps_to_forget,
    virial,
    whole,
)
from genmodels.registry import ConfigError
from genmodels.rng import generator

# by quadrature on the 2 x 2 lattice: log Z, then means of φ², φ⁴, neighbours, diagonal neighbours and m²
TWO_BY_TWO = {
    0.5: (4.75810212, 0.69877241, 0.81140194, 0.42403146, 0.34718827, 0.47350590),
    0.68: (5.57312709, 0.89843364, 1.18750557, 0.71807169, 0.66861414, 0.75079779),
    0.76: (6.07789753, 1.00478866, 1.40534715, 0.85914845, 0.82186193, 0.88623687),
}


@pytest.fixture(autouse=True)
def fewer_sweeps(request, monkeypatch):
    """For the normaliser; on few sites 10 sweeps at each coupling are enough to forget the one before."""
    if "slow" not in request.keywords:
        monkeypatch.setattr(phi4, "bonds_on_the_way", partial(bonds_on_the_way, burn_in=10, sweeps=20))


def means(phi: Tensor) -> Tensor:
    """[B, 5] what the table lists, for each field."""
    parts = [phi**2, phi**4, phi * phi.roll(1, -1), phi * phi.roll((1, 1), (-1, -2))]
    return torch.stack([*(part.flatten(1).mean(1) for part in parts), phi.flatten(1).mean(1) ** 2], 1)


def field() -> Tensor:
    place = 2 * math.pi * torch.arange(8, dtype=torch.float64) / 8
    return (place.sin().reshape(-1, 1) + (2 * place).cos() / 2)[None]


@pytest.mark.parametrize(
    ("beta", "wave", "constant", "board"),
    [
        (0.5, -21.3137084990, -47.3536, 15.3664),
        (0.68, -32.5866435586, -58.6432, 26.6560),
        (0.76, -37.5968369185, -63.6608, 31.6736),
    ],
)
def test_energies_of_known_fields(beta, wave, constant, board):
    flat = torch.full((1, 8, 8), 0.7, dtype=torch.float64)
    sign = torch.tensor([1.0, -1.0]).repeat(4)
    fields = torch.cat((field(), flat, flat * sign * sign.reshape(-1, 1)))
    expected = torch.tensor([wave, constant, board], dtype=torch.float64)
    torch.testing.assert_close(energy(fields, beta), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(energy(fields.unsqueeze(1), beta), expected, rtol=0, atol=1e-9)
    gradients = ((fields.roll(-1, 1) - fields) ** 2 + (fields.roll(-1, 2) - fields) ** 2).sum((1, 2))
    other = beta / 2 * gradients + (fields**4 - (1 + 2 * beta) * fields**2).sum((1, 2))
    torch.testing.assert_close(energy(fields, beta), other, rtol=0, atol=1e-9)


def test_the_force_is_minus_the_gradient():
    phi = start(3, 4, generator("force")).unsqueeze(1).requires_grad_()
    (gradient,) = torch.autograd.grad(energy(phi, 0.68).sum(), phi)
    torch.testing.assert_close(force(phi, 0.68), -gradient, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(virial(phi, 0.68), (phi * gradient).flatten(1).mean(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("beta", "z", "square", "fourth"),
    [
        (0.68, 7.4345956111, 0.9828513927, 1.4097646433),
        (0.5, 5.3651602378, 0.8327454871, 1.0827454871),
        (0.76, 8.7510727536, 1.0556358859, 1.5801012163),
    ],
)
def test_one_site_that_is_its_own_neighbour(beta, z, square, fourth):
    t = torch.linspace(-5, 5, 4001, dtype=torch.float64)
    weight = (-energy(t.reshape(-1, 1, 1), beta)).exp() * 10 / 4000
    assert float(weight.sum()) == pytest.approx(z, abs=1e-9)
    assert [float((weight * t**k).sum() / z) for k in (2, 4)] == pytest.approx([square, fourth], abs=1e-9)
    assert site_normalizer() == pytest.approx(1.01571932, abs=5e-9)


@cache
def grid(nodes: int = 27, edge: float = 2.7) -> tuple[Tensor, Tensor, float]:
    """[nodes⁴, 2, 2] fields, their means, and the volume of a cell: sums over them are exact to 1e-6."""
    axis = torch.linspace(-edge, edge, nodes, dtype=torch.float64)
    phi = torch.cartesian_prod(axis, axis, axis, axis).reshape(-1, 2, 2)
    return phi, means(phi), (2 * edge / (nodes - 1)) ** 4


@pytest.mark.parametrize("beta", TWO_BY_TWO)
def test_quadrature_of_the_energy_gives_the_table(beta):
    phi, values, cell = grid()
    log_weight = -energy(phi, beta) + math.log(cell)
    log_z = log_weight.logsumexp(0)
    found = (log_weight - log_z).exp() @ values
    assert float(log_z) == pytest.approx(TWO_BY_TWO[beta][0], abs=1e-6)
    torch.testing.assert_close(found, torch.tensor(TWO_BY_TWO[beta][1:]).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("beta", TWO_BY_TWO)
def test_chains_on_two_by_two_sites_have_the_exact_means(beta):
    phi = torch.cat(list(chains(2, beta, 24_000, 6, 40, 6, "test")))
    each = means(phi)
    error = each.reshape(6, -1, 5).mean(0).std(0) / 4000**0.5  # over chains, which are independent
    assert ((each.mean(0) - torch.tensor(TWO_BY_TWO[beta][1:])).abs() < 4 * error).all()
    assert error.max() < 0.008  # so that the law of another update rule would be told apart


def test_colours_are_a_chessboard():
    phi = start(2, 6, generator("colours"))
    black, white = colours(phi)
    board = (torch.arange(6).reshape(-1, 1) + torch.arange(6)) % 2
    assert torch.equal(black.flatten(1), phi[:, board == 0]) and torch.equal(white.flatten(1), phi[:, board == 1])
    assert torch.equal(whole(black, white), phi)
    around = colours(around_by_hand(phi))
    torch.testing.assert_close(phi4_lattice._around(white, black=True), around[0])
    torch.testing.assert_close(phi4_lattice._around(black, black=False), around[1])


def around_by_hand(phi: Tensor) -> Tensor:
    return torch.stack([phi.roll(step, axis) for step in (1, -1) for axis in (1, 2)]).sum(0)


def test_an_autocorrelation_time_of_known_size():
    """ρ(t) = r^t gives ½ + r/(1 - r); the relative error is about √(2 (2 W + 1)/(T C)), W = 5 τ."""
    r, series = 0.8, [torch.randn(400, generator=generator("ar"), dtype=torch.float64)]
    source = generator("steps")
    for _ in range(299):
        series.append(r * series[-1] + (1 - r**2) ** 0.5 * torch.randn(400, generator=source, dtype=torch.float64))
    tau = sweeps_to_forget(3.0 + 2 * torch.stack(series))
    assert tau == pytest.approx(4.5 * (1 - r**22.5), rel=4 * (2 * 46 / 120_000) ** 0.5)
    assert sweeps_to_forget(torch.stack(series)[:20]) == math.inf


def test_autocorrelation_times_decide_which_fields_are_drawn():
    """They are those of the fields that caches and published results hold: sums over pairs, written out."""
    source = generator("phi4 mixing", 8, "0.68", 0)
    phi, means = start(64, 8, source), []
    for _ in range(256):
        phi = sweep(phi, 0.68, source)
        means.append(phi.mean((1, 2)))
    m = torch.stack(means[128:])
    for found, series in zip(mixing(8, 0.68)[:2], (m.square(), m.abs()), strict=True):
        values = series - series.mean()
        tau, t = 0.5, 0
        while t < 5 * tau:
            t += 1
            tau += float((values[:-t] * values[t:]).mean() / values.square().mean())
        assert found == pytest.approx(tau, rel=1e-12)
    assert mixing(8, 0.68) == pytest.approx((4.23129015, 4.05571375, 64, 13), rel=1e-7)


def test_items_of_a_chain_are_nearly_independent_and_interleaved():
    mix = mixing(4, 0.68)
    assert 1.5 < mix.square < 6 and mix.burn_in >= 15 * mix.square and mix.thinning >= 3 * mix.square
    phi = torch.cat(list(chains(4, 0.68, 4000, 4, mix.burn_in, mix.thinning, "x")))
    square = phi.mean((1, 2)).square().reshape(4, 1000)
    centred = square - square.mean()
    ratio = lambda other: float((centred[:-1] * other).mean() / centred.square().mean())  # noqa: E731
    assert ratio(centred[1:].roll(1, 1)) < 4 / 3000**0.5
    assert ratio(centred[1:]) < math.exp(-3) + 4 / 3000**0.5  # 1/√n for pairs
    one, other = (torch.cat(list(chains(4, 0.68, 200, 2, 0, 1, "x"))) for _ in range(2))
    assert torch.equal(one, other)
    moved = (one[:100].abs() != one[100:].abs()).double().mean()
    assert 0.4 < moved < 0.9  # a chain's second field is one sweep of two proposals after its first


def test_groups_of_chains_do_not_change_what_is_asked_for(monkeypatch):
    monkeypatch.setattr(phi4_lattice, "GROUP", 5 * 16)
    groups = list(chains(4, 0.5, 43, 4, 1, 1, "g"))
    assert [len(group) for group in groups] == [20, 20, 3]
    assert len(torch.cat(groups).flatten(1).unique(dim=0)) == 43


def test_sweeps_before_and_between_the_items_of_a_chain(monkeypatch):
    monkeypatch.setattr(phi4_lattice, "start", lambda count, size, source: torch.zeros(count, size, size))
    monkeypatch.setattr(phi4_lattice, "sweep", lambda phi, beta, source: phi + 1)
    (fields,) = chains(2, 0.5, 5, 3, 7, 2, "counted")
    assert fields[:, 0, 0].tolist() == [7, 7, 9, 9, 11]


def test_the_error_of_the_binder_cumulant_is_that_of_the_jackknife():
    m = torch.randn(3000, generator=generator("jackknife")).double() + 0.4
    second, fourth = m.square(), m**4
    out = [v.sum() - v for v in (second, fourth)]
    without = 1 - (out[1] / 2999) / (3 * (out[0] / 2999) ** 2)
    jackknife = ((2999 / 3000) * (without - without.mean()).square().sum()).sqrt()
    assert binder(m.reshape(-1, 1, 1, 1))[1] == pytest.approx(float(jackknife), rel=0.03)  # equal to first order in 1/n


def test_the_binder_cumulant_of_known_laws():
    signs = torch.ones(1000, 1, 2, 2)
    signs[::2] = -1
    value, error = binder(signs)
    assert value == pytest.approx(2 / 3) and error == pytest.approx(0, abs=1e-12)
    values = [binder(torch.randn(4000, 1, 1, 1, generator=generator("u", k))) for k in range(20)]
    cumulants, errors = (torch.tensor(column) for column in zip(*values, strict=True))
    assert abs(cumulants.mean()) < 4 * errors.mean() / 20**0.5
    assert errors.mean() == pytest.approx(float(cumulants.std()), rel=0.6)


# ---- the data set ----


def test_items_are_equilibrium_fields():
    """The virial identity, and moments of 8² fields found by others with standard errors (0.001 and 0.004)."""
    data = Phi4(size=8, count=1000, reference=500, seed=3)
    x = torch.cat([data.all(split).x for split in ("train", "val", "test")]).double()
    identity, square = virial(x, 0.68), x.square().flatten(1).mean(1)
    root = len(x) ** 0.5
    assert abs(identity.mean() - 1) < 4 * identity.std() / root
    assert abs(square.mean() - 0.8458) < 4 * math.hypot(float(square.std()) / root, 0.001)
    cumulant, error = binder(x)
    assert abs(cumulant - 0.595) < 4 * math.hypot(error, 0.004)
    assert [data.size(split) for split in ("train", "val", "test")] == [1000, 200, 500]
    assert data.log_prob(x[:3]) is None and data.floor() is None and len(data.checks()) == 3
    assert data.log_prob_stderr == 0
    assert "1 is exact" in data.checks()[1] and f"{data.mixing.thinning} sweeps apart" in data.checks()[2]
    assert data.periodic is True and data.facts()["periodic"] is True


def test_the_density_is_normalised_within_its_error():
    data = Phi4(size=2, count=5, reference=40, normalizer=True)
    value, error = data.log_z
    assert data.log_prob_stderr == pytest.approx(math.prod(data.shape) * error) and error > 0
    assert abs(value - TWO_BY_TWO[0.68][0] / 4) < 4 * error < 0.02
    phi, _, cell = grid()
    total = float((data.log_prob(phi.unsqueeze(1)) + math.log(cell)).logsumexp(0))
    assert abs(total) < 4 * 4 * error and total == pytest.approx(TWO_BY_TWO[0.68][0] - 4 * value, abs=1e-6)
    floor = data.floor()
    exact = TWO_BY_TWO[0.68][0] / 4 + 0.5 - TWO_BY_TWO[0.68][2]  # ⟨E⟩/N = ½ - ⟨φ⁴⟩
    assert abs(floor.value - exact) < 4 * floor.stderr and floor.unit == "nats/site" and floor.n == 40
    assert "nats/site" in data.checks()[3]


def test_nothing_is_simulated_before_an_item_is_asked_for(monkeypatch):
    monkeypatch.setattr(phi4, "chains", None)
    monkeypatch.setattr(phi4, "mixing", None)
    data = Phi4(size=4, count=7, reference=3, seed=99)
    assert data.size("val") == 1 and data.facts()["shape"] == [1, 4, 4]
    with pytest.raises(TypeError):
        data.all("test")


def test_the_cache_holds_fields_and_normaliser_and_is_made_again_if_damaged(tmp_path, monkeypatch):
    options = {"size": 2, "count": 50, "reference": 20, "normalizer": True}
    plain, first = Phi4(**options), Phi4(**options, cache=str(tmp_path))
    for split in ("train", "val", "test"):
        assert torch.equal(plain.all(split).x, first.all(split).x)
    assert plain.log_z == first.log_z and plain.mixing == first.mixing
    arrays = sorted(tmp_path.glob("*.npy"), key=lambda path: path.stat().st_size)
    assert len(arrays) == 2
    with monkeypatch.context() as patch:
        patch.setattr(phi4, "mixing", None)
        patch.setattr(phi4, "_bonds", None)
        again = Phi4(**options, cache=str(tmp_path))
        assert torch.equal(again.all("test").x, plain.all("test").x) and again.log_z == plain.log_z
        assert again.mixing == plain.mixing and again.fingerprint() == plain.fingerprint()
        with pytest.raises(TypeError):
            Phi4(**{**options, "seed": 1}, cache=str(tmp_path)).all("test")
    arrays[0].write_bytes(arrays[0].read_bytes()[:-4] + b"oops")
    with pytest.warns(CacheWarning, match="is made again"):
        mended = Phi4(**options, cache=str(tmp_path))
        assert torch.equal(mended.all("val").x, plain.all("val").x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 7}, "even and at least 2.*found 7. Take 8"),
        ({"size": 0}, "Take 2"),
        ({"beta": -0.1}, "beta must be at least 0"),
        ({"count": 4}, "count must be at least 5"),
        ({"reference": 0}, "reference must be at least 1"),
    ],
)
def test_impossible_lattices_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Phi4(**options)


def test_seeds_and_splits_are_independent():
    data, other = (Phi4(size=2, count=20, reference=20, seed=seed) for seed in (0, 1))
    assert not torch.equal(data.all("train").x, other.all("train").x)
    assert not torch.equal(data.all("train").x, data.all("test").x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "square", "log_z", "entropy"), [(8, 0.8458, 1.2248, 0.6427), (16, 0.8339, 1.2176, 0.6573)]
)
def test_values_near_the_critical_point(size, square, log_z, entropy):
    """Found by others with standard errors 0.001, 0.0003 and 0.0015."""
    data = Phi4(size=size, count=4000, reference=4000, normalizer=True)
    values = data.all("test").x.double().square().flatten(1).mean(1)
    assert abs(values.mean() - square) < 4 * math.hypot(float(values.std()) / 4000**0.5, 0.001)
    assert abs(data.log_z[0] - log_z) < 4 * math.hypot(data.log_z[1], 0.0003)
    assert abs(data.floor().value - entropy) < 4 * math.hypot(data.floor().stderr, 0.0015)
    assert (
        abs(float(bond(data.all("train").x.double()).mean()) - float(bond(data.all("test").x.double()).mean())) < 0.02
    )
