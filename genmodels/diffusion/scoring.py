"""Likelihoods of a diffusion model: along its ODE, or as the evidence bound of its SDE."""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from ..rng import Noise, SeedNoise
from ..solvers.base import Controller, Solver
from ..solvers.divergence import by_probe, mean_over_probes, transport
from ..solvers.fields import RowField
from ..solvers.runge_kutta import Dopri5
from ..solvers.step_size import PI
from ..types import Condition, Likelihood, NotApplicable, Seeds, sum_items
from .checks import at_least_one, one_each, one_of
from .elbo import Decoder, evidence_bound, mean_over_draws


class Scored:
    """The part of `DiffusionModel` that scores items."""

    def likelihood(
        self,
        x: Tensor,
        *,
        condition: Condition | None = None,
        seeds: Seeds | None = None,
        method: Literal["ode", "elbo"] = "ode",
        divergence: Literal["exact", "hutchinson"] = "exact",
        decoder: Decoder = "gaussian",
        probes: int = 1,
        draws: int = 1,
        num_steps: int = 50,
        solver: Solver = Dopri5(),
        controller: Controller = PI(),
        batch_size: int = 256,
    ) -> Likelihood:
        """log p(x) = log N(z; 0, σ(t_max)²) + ∫ div v dt + log|det ∂T/∂x| in nats, along the ODE from T(x) to z.

        The path starts at t_min instead of 0. For discrete data the value is E_u[log p(x + u)], a bound. Gradients flow
        if they are enabled, and need the memory of every step: score data under `torch.no_grad`.

        The method "elbo" gives the evidence bound of the SDE with the same score instead (see `elbo.evidence_bound`),
        which takes one evaluation of the network for each of `probes` times, and one at the decoder. The two are laws
        of different models unless the network is exact.

        Args:
            x: [B, *shape] in data units.
            condition: [B, *]; None scores unconditionally.
            seeds: [B] for dequantisation noise and probes; 0 … B-1 if not given.
            method: ode or elbo.
            divergence: exact costs a backward pass for each component, hutchinson one for each probe.
            decoder: of the bound; discretized gives the log-mass of the cell of discrete items, without dequantisation.
            probes: how many, for hutchinson; two or more give a standard error. For elbo, into how many parts of equal
                log-SNR the path is cut, each with one time.
            draws: how many values of the dequantisation noise are averaged over, each with probes of its own; for elbo
                two or more give a standard error.
            num_steps: of the controller "fixed"; without meaning under step control, whose tolerances are its own.
            solver, controller: of the ODE.
            batch_size: how many are scored at once.
        Returns:
            kind numerical for the exact divergence, stochastic for hutchinson, bound for elbo. For discretized the
            value is the log-mass less D log(bin_width), so that it compares with a density.
        Raises:
            NotApplicable: if the transform to model space has no volume; for elbo, if items and noise were coupled in
                training.
            ValueError: if conditions, seeds, counts or the decoder do not fit.
        Source: Song et al. 2021 (Score-based generative modeling through SDEs), section 4.3; Grathwohl et al. 2019
            (FFJORD), section 3.1; Kingma et al. 2021 (Variational diffusion models).
        """
        self.check_items(x, "likelihood")
        self._check_volume()
        condition = self.conditions.checked(condition, len(x), "likelihood")
        at_least_one("likelihood", draws=draws, probes=probes, batch_size=batch_size)
        one_of("likelihood", "method", method, ("ode", "elbo"))
        if method == "ode" and decoder != "gaussian":
            raise ValueError(
                f"likelihood: the decoder {decoder} is of the method elbo. Give method=elbo, or no decoder."
            )
        seeds = one_each(seeds, len(x))
        parts = []
        with self._gradients(x):
            for rows in torch.arange(len(x)).split(batch_size):
                given = (x[rows], None if condition is None else condition[rows], seeds[rows])
                if method == "elbo":
                    self.check_independent("likelihood by the method elbo")
                    parts.append(evidence_bound(self, *given, probes=probes, draws=draws, decoder=decoder))
                else:
                    ode = {"solver": solver, "controller": controller, "divergence": divergence, "probes": probes}
                    parts.append(self._draws(*given, draws, self._grid(num_steps, controller), ode))
        values = torch.cat(parts, -1)
        return mean_over_draws(values) if method == "elbo" else mean_over_probes(values, divergence)

    def check_independent(self, where: str) -> None:
        """Raises NotApplicable if a score is asked of a model that was trained with coupled noise."""
        if not self.coupling.independent:
            raise NotApplicable(
                f"{where}: under the coupling '{self.coupling.registered_name}' the noise says something about the "
                "item, so that -ε̂/σ is no score. Velocities, samples and likelihoods by the ODE remain."
            )

    def _draws(
        self, x: Tensor, condition: Tensor | None, seeds: Tensor, count: int, times: Tensor, ode: dict[str, Any]
    ) -> Tensor:
        """[count, P, B] values for as many draws of the dequantisation noise."""
        noise = [SeedNoise(seeds, purpose=p, device=x.device) for p in ("dequantise", "probe")]
        return torch.stack([self._log_prob(x, condition, *noise, times, ode) for _ in range(count)])

    def _log_prob(
        self, x: Tensor, condition: Tensor | None, noise: Noise, probe_noise: Noise, times: Tensor, ode: dict[str, Any]
    ) -> Tensor:
        """[P, B] one value for each probe; P = 1 for the exact divergence."""
        y, log_volume = self._to_model_space(x, None if self.bin_width is None else noise)
        moved = transport(RowField(self.denoiser.velocity, condition), y, times, noise=probe_noise, **ode)
        scale = self.prior_scale()
        normalizer = math.prod(self.model_shape) * (math.log(scale) + 0.5 * math.log(2 * math.pi))
        log_prior = -0.5 * sum_items((moved.z.double() / scale).square()) - normalizer
        return by_probe(log_prior + log_volume + moved.log_det, len(x))
