"""RF-Solver and its neighbours as a scheduler of stock pipelines of diffusers, down to items and up to noise."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch

# diffusers' loader of pipelines looks for SchedulerMixin beside a scheduler, to see how that is loaded
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin  # noqa: F401
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor

from ..editing.editor import Place
from ..registry import ConfigError

SOLVERS = ("rf", "rf3", "fireflow", "euler")


class Entry(NamedTuple):
    """One evaluation of the network.

    Args:
        sigma: where it is asked, in the scheduler's own clock.
        step: counted in the direction of the run.
        stage: within the step.
    """

    sigma: float
    step: int
    stage: int


class Rule(NamedTuple):
    """An explicit one-step method: k_i = v(σ + c_i h, x + h Σ_j a_ij k_j), x⁺ = x + h Σ_i b_i k_i.

    Args:
        nodes: c.
        rows: of a, one for each stage after the first, and b as the last.
    """

    nodes: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]


def rule(solver: str, probe: float) -> Rule:
    """The method of a name; FireFlow's stages are its own, its nodes those of the midpoint rule."""
    if solver == "euler":
        return Rule((0.0,), ((1.0,),))
    if solver == "rf3":
        return Rule((0.0, 1 / 3, 2 / 3), ((1 / 3,), (0.0, 2 / 3), (0.25, 0.0, 0.75)))
    if solver == "fireflow":
        return Rule((0.0, 0.5), ((0.5,), (0.0, 1.0)))
    return Rule((0.0, probe), ((probe,), (1 - 0.5 / probe, 0.5 / probe)))


class RFSolverScheduler(FlowMatchEulerDiscreteScheduler):
    """RF-Solver for unchanged pipelines of rectified flows, down to items or, as an inversion, up to noise.

    The knots k_0 … k_N are those of diffusers' Euler scheduler of the same configuration (all shifts included), flipped
    for an inversion. They are not those of UniPC and others with `use_flow_sigmas`: Euler's scheduler applies a static
    shift twice, so that noise from one of these fits itself alone. A step from k to k + h asks the network at k and at
    the probe k + c h, and with c = `probe` takes

        x⁺ = x + h ((1 - 1/2c) v(k, x) + 1/2c v(k + c h, x + c h v(k, x))),

    so that every step is two entries of `timesteps`, and guidance acts at both. "rf3" is Heun's method of order 3 with
    three; "fireflow" takes the last midpoint's velocity to the next probe, N + 1 entries in all; "euler" has N. A run
    that begins between two knots (pictures to pictures) makes steps of Euler's up to the next knot.

    States are kept in float32 at least beside those that the pipeline rounds: where what comes back equals the kept
    state rounded, element by element, the kept one goes on. What a callback or a mask changes stays changed, also
    between the entries of one step. `final_sample` is the last state unrounded; `seed` gives it to a run that begins
    there, of which the pipeline then only sees the rounded state.

        pipe.scheduler = RFSolverScheduler.from_config(pipe.scheduler.config, inversion=True)
        z = pipe(source, latents=x, guidance_scale=1.0, num_inference_steps=15, output_type="latent", …).images
        pipe.scheduler = RFSolverScheduler.from_config(pipe.scheduler.config, inversion=False)
        y = pipe(target, latents=z, guidance_scale=2.0, num_inference_steps=15, …).images

    Folders of pipelines that were saved with it are loaded once `genmodels.export.rf_solver` is imported.

    Args:
        solver: rf, rf3, fireflow or euler.
        probe: c, above 0 and at most 1, for "rf" alone: 1/2 is the midpoint rule, as published; 1 is Heun's method.
        inversion: go from items to noise.
        fp32_master: keep unrounded states from step to step.
        num_train_timesteps, shift, …: those of FlowMatchEulerDiscreteScheduler.
    Attributes:
        final_sample: [B, …] the state at the end of a run, float32 at least; None before.
        items: in the states of the last call of `step`; 0 before.
        order: entries of a step as pipelines count them: 1 where they give sigmas, for they then count the entries.
    Raises:
        ConfigError: if solver or probe are none, if the probe has no effect, or steps are to draw noise.
    Source: Wang et al. 2025 (Taming rectified flow for inversion and editing), algorithm 1; Deng et al. 2024
        (FireFlow), algorithm 1.
    """

    _compatibles: ClassVar[list[str]] = ["FlowMatchEulerDiscreteScheduler"]

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        stochastic_sampling: bool = False,
        solver: Literal["rf", "rf3", "fireflow", "euler"] = "rf",
        probe: float = 0.5,
        inversion: bool = False,
        fp32_master: bool = True,
    ) -> None:
        if solver not in SOLVERS:
            raise ConfigError(f"RFSolverScheduler: solver is one of {', '.join(SOLVERS)}, found {solver!r}.")
        if not 0 < probe <= 1:
            raise ConfigError(f"RFSolverScheduler: probe is a part of a step, above 0 and at most 1, found {probe}.")
        if probe != 0.5 and solver != "rf":
            raise ConfigError(f"RFSolverScheduler: probe={probe} has no effect on '{solver}'. Leave it out, or use rf.")
        if stochastic_sampling:
            raise ConfigError(
                "RFSolverScheduler: stochastic_sampling draws noise in every step, which no solver of an ordinary "
                "differential equation does. Set it to False, or keep the model's own scheduler."
            )
        super().__init__(  # by name: diffusers takes those given by position for defaults, and forgets them
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift,
            max_shift=max_shift,
            base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len,
            invert_sigmas=invert_sigmas,
            shift_terminal=shift_terminal,
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
            time_shift_type=time_shift_type,
            stochastic_sampling=stochastic_sampling,
        )
        self._rule = rule(solver, probe)
        self._knots: list[float] = []
        self._entries: list[Entry] = []
        self._seed: Tensor | None = None
        self._forget()

    def _forget(self) -> None:
        """No run has begun."""
        self.final_sample: Tensor | None = None
        self.items = 0
        self._kept: Tensor | None = None  # what the last call of `step` returned, unrounded
        self._base: Tensor | None = None  # the state at the knot where the present step began
        self._slopes: list[Tensor] = []

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler for the model that another scheduler of rectified flows was made for.

        Schedulers for several kinds of models (UniPC for Wan) name the shift flow_shift.

        Raises:
            ConfigError: if the other scheduler is not one of rectified flows.
        """
        given = dict(config) if isinstance(config, Mapping) else config
        if isinstance(given, dict) and ("beta_schedule" in given or "sigma_data" in given):
            if not given.get("use_flow_sigmas"):
                raise ConfigError(
                    f"RFSolverScheduler: {given.get('_class_name', 'the configuration')} is not known as a "
                    "scheduler of rectified flows, whose velocity this one steps. Take a pipeline that has a "
                    "FlowMatchEulerDiscreteScheduler, or one with use_flow_sigmas."
                )
            given.setdefault("shift", given.get("flow_shift") or 1.0)
            for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
                given[key] = False  # grids of those names are others there
        return super().from_config(given, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """Set the knots, as diffusers' Euler scheduler does, and begin a new run.

        Raises:
            ValueError: if there is not a step, or if timesteps are given, which say nothing of probes.
        """
        if timesteps is not None:
            raise ValueError("RFSolverScheduler: timesteps can't be given, since there is one for each probe too. "
                             "Give sigmas, of which shifts are taken.")  # fmt: skip
        count = num_inference_steps if sigmas is None else len(sigmas)
        if count is None or count < 1:
            raise ValueError(f"RFSolverScheduler: at least 1 step is needed, found {count}.")
        super().set_timesteps(num_inference_steps, "cpu", sigmas, mu)
        self._knots = self.sigmas.double().tolist()
        if self.config.inversion:
            self._knots.reverse()
        self._entries = self._listed()
        values = torch.tensor([entry.sigma for entry in self._entries], dtype=torch.float64)
        last = torch.tensor([self._knots[-1]], dtype=torch.float64)
        self.timesteps = (values * self.config.num_train_timesteps).to(device, torch.float32)
        self.sigmas = torch.cat((values, last)).to(device, torch.float32)
        # given sigmas, pipelines take the number of timesteps for that of steps
        alone = sigmas is not None or self.config.solver == "fireflow"
        self.order = 1 if alone else len(self._rule.nodes)
        self._forget()

    def _listed(self) -> list[Entry]:
        found = []
        for number, (k, s) in enumerate(zip(self._knots, self._knots[1:], strict=False)):
            # s itself, since k + (s - k) need not be s
            stages = [Entry(s if c == 1 else k + c * (s - k), number, i) for i, c in enumerate(self._rule.nodes)]
            found += stages[1:] if number and self.config.solver == "fireflow" else stages
        return found

    @property
    def place(self) -> Place | None:
        """Where the network is asked next: what sharing of features goes by; the last place once a run has ended."""
        if not self._entries:
            return None
        index = (self._begin_index or 0) if self._step_index is None else self._step_index
        entry = self._entries[min(index, len(self._entries) - 1)]
        interval = len(self._knots) - 2 - entry.step if self.config.inversion else entry.step
        return Place(interval, entry.stage, 1 - entry.sigma if self.config.invert_sigmas else entry.sigma)

    def seed(self, sample: Tensor) -> None:
        """Begin the next run at a state that the pipeline is given too, but rounds: `final_sample` of an inversion."""
        self._seed = sample

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | None = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """The state at which the network is to be asked next, or the last one, in the dtype of the sample.

        Args:
            model_output: [B, …] the velocity at the present entry.
            timestep: of the entry; entries are counted, and it is looked up in the first step alone.
            sample: [B, …] the state at the present entry.
        Raises:
            ValueError: if the run has ended or was not begun, if noise or times of tokens are asked for, or if the
                first state is not the one given to `seed`.
        """
        if s_churn:
            raise ValueError(f"RFSolverScheduler: s_churn={s_churn} adds noise, which this solver can't take. Set 0.")
        if per_token_timesteps is not None:
            raise ValueError(
                "RFSolverScheduler: times that differ between tokens (per_token_timesteps, of pipelines that continue "
                "given frames) are not supported. Use FlowMatchEulerDiscreteScheduler for this pipeline."
            )
        if not self._entries:
            raise ValueError("RFSolverScheduler: call set_timesteps before step.")
        if self._step_index is None:
            self._init_step_index(timestep)
        if self._step_index >= len(self._entries):
            raise ValueError(
                f"RFSolverScheduler: all {len(self._entries)} entries have been taken. Call set_timesteps to run anew."
            )
        exact, self.items = self._kept_of(sample), len(sample)
        following = self._advanced(model_output.to(exact.dtype), exact, self._entries[self._step_index])
        self._step_index += 1
        self._kept = following
        if self._step_index == len(self._entries):
            self.final_sample, self._base, self._slopes = following, None, []
        rounded = following.to(sample.dtype)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=rounded) if return_dict else (rounded,)

    def _kept_of(self, sample: Tensor) -> Tensor:
        """The state of the present entry: kept elements where the sample is what they are rounded, else its own."""
        seed, self._seed = self._seed, None
        if seed is not None:
            seed = seed.to(sample.device)
            if seed.shape != sample.shape or not torch.equal(seed.to(sample.dtype), sample):
                raise ValueError(
                    f"RFSolverScheduler: the run begins at another state ({list(sample.shape)}) than the one given to "
                    f"`seed` ({list(seed.shape)}), by shape or by numbers. Give the pipeline the same latents."
                )
            self._kept = seed
        wide = torch.promote_types(sample.dtype, torch.float32)
        own = sample.to(wide)
        if self._kept is None or self._kept.shape != sample.shape:
            return own
        kept = self._kept.to(wide)
        same = kept.to(sample.dtype) == sample
        if self._base is not None:  # within a step: what was changed from outside, the step's beginning has to take too
            self._base = self._base + torch.where(same, 0.0, own - kept)
        return torch.where(same, kept, own) if self.config.fp32_master or seed is not None else own

    def _advanced(self, v: Tensor, x: Tensor, entry: Entry) -> Tensor:
        """The state of the next entry, or at the last knot."""
        h = self._knots[entry.step + 1] - self._knots[entry.step]
        if entry.stage == 0:
            self._base, self._slopes = x, []
        if self.config.solver == "fireflow" and entry.stage:
            return self._reused(v, x, h, entry)
        if len(self._slopes) != entry.stage:  # the run began within this step
            return x + (self._target(entry) - entry.sigma) * v
        self._slopes.append(v)
        weights = self._rule.rows[entry.stage]
        total = sum(weight * slope for weight, slope in zip(weights, self._slopes, strict=True) if weight)
        following = self._base + h * total
        if entry.stage + 1 == len(self._rule.nodes):
            self._base, self._slopes = None, []
        return following

    def _target(self, entry: Entry) -> float:
        """Where the next entry of the step is asked, or the step ends."""
        nodes, k, s = self._rule.nodes, self._knots[entry.step], self._knots[entry.step + 1]
        return s if entry.stage + 1 == len(nodes) else k + nodes[entry.stage + 1] * (s - k)

    def _reused(self, v: Tensor, x: Tensor, h: float, entry: Entry) -> Tensor:
        """FireFlow: the step by its midpoint's velocity, which leads to the midpoint of the next step as well."""
        end = x + (self._target(entry) - entry.sigma) * v if self._base is None else self._base + h * v
        if entry.step + 2 == len(self._knots):
            return end
        self._base = end
        return end + (self._knots[entry.step + 2] - self._knots[entry.step + 1]) / 2 * v
