"""E-TSDM for networks of diffusers: a wrapper that shares early timesteps, and works with stock pipelines.

`TimestepShared` is made when it is first asked for, so that importing this module does not import diffusers.
"""

import functools
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Timestep = Tensor | float | int


def shared_edges(n: int, t_tilde: int) -> tuple[int, ...]:
    """The n + 1 edges ⌊i t̃/n⌋ of intervals of whole timesteps, from 0 to t̃.

    Raises:
        ValueError: if there is no interval, or not a timestep for each.
    """
    if n < 1 or t_tilde < 1:
        raise ValueError(f"TimestepShared: n >= 1 and t_tilde >= 1 are needed, found n={n} and t_tilde={t_tilde}.")
    edges = tuple(i * t_tilde // n for i in range(n + 1))
    if any(low == high for low, high in pairwise(edges)):
        raise ValueError(
            f"TimestepShared: {n} intervals do not fit into the {t_tilde} timesteps 0 … {t_tilde - 1}. Choose n <= "
            "t_tilde."
        )
    return edges


def share(timestep: Timestep, edges: tuple[int, ...]) -> Timestep:
    """The left edge of the interval of a timestep below the last edge, and any other timestep itself.

    A number stays a number of its type, and a tensor keeps shape, dtype and device.
    """
    if not isinstance(timestep, Tensor):
        return type(timestep)(share(torch.tensor(timestep, dtype=torch.float64), edges).item())
    bounds = torch.tensor(edges, dtype=timestep.dtype, device=timestep.device)
    index = torch.bucketize(timestep, bounds[1:-1], right=True)
    return torch.where(timestep < bounds[-1], bounds[index], timestep)


def __getattr__(name: str) -> Any:
    if name == "TimestepShared":
        return _timestep_shared()
    if name == "ModelMixin":  # diffusers' loader of pipelines looks for it beside a class, to see how that is loaded
        from diffusers import ModelMixin

        return ModelMixin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _timestep_shared() -> type:
    import diffusers
    from diffusers.configuration_utils import ConfigMixin, FrozenDict
    from diffusers.models.modeling_utils import ModelMixin

    class TimestepShared(ModelMixin, ConfigMixin):
        """A network of diffusers whose timesteps below t̃ share the left edge of their interval (E-TSDM).

        The network sees max{eᵢ : eᵢ <= t} of the edges ⌊i t̃/n⌋ for t < t̃, and t otherwise; the scheduler keeps t.
        Everything else is passed through: stock pipelines and schedulers work unchanged. `config` has the entries of
        the network's own, which pipelines read; a saved folder loads by `TimestepShared.from_pretrained`, or with the
        pipeline that holds it once genmodels is imported (diffusers imports no module that a folder names).

        Args:
            unet: a model of diffusers, called as unet(sample, timestep, …); or its configuration, to make a new one.
            n: number of intervals.
            t_tilde: t̃ in timesteps.
        Raises:
            ValueError: if there is no interval or not a timestep for each, if t̃ exceeds the steps that the network
                knows (`num_train_timesteps`, where it says), or if the configuration names no model of diffusers.
        Source: Yang et al. 2024 (Lipschitz Singularities in Diffusion Models).
        """

        _supports_gradient_checkpointing = True

        def __init__(self, unet: Any, n: int = 5, t_tilde: int = 100) -> None:
            super().__init__()
            self.edges = shared_edges(n, t_tilde)
            if not isinstance(unet, torch.nn.Module):
                kind = getattr(diffusers, str(unet.get("_class_name")), None)
                if kind is None:
                    raise ValueError(
                        f"TimestepShared: {unet.get('_class_name')!r} is no model of diffusers. Give the model itself, "
                        "or its configuration with the entry _class_name."
                    )
                unet = kind.from_config(dict(unet))
            known = unet.config.get("num_train_timesteps")
            if known is not None and t_tilde > known:
                raise ValueError(f"TimestepShared: t_tilde={t_tilde} is beyond the network's {known} timesteps.")
            self.network = unet  # not `unet`: their attribute lookup would answer with the configuration's entry
            plain = {key: value for key, value in unet.config.items() if not key.startswith("_")}
            self.register_to_config(unet={"_class_name": type(unet).__name__, **plain}, n=int(n), t_tilde=int(t_tilde))

        @property
        def config(self) -> Any:
            """The network's own configuration, with the entries unet, n and t_tilde of the wrapper."""
            return FrozenDict({**self._internal_dict["unet"], **self._internal_dict})

        def forward(self, sample: Tensor, timestep: Timestep, *args: Any, **kwargs: Any) -> Any:
            return self.network(sample, share(timestep, self.edges), *args, **kwargs)

    TimestepShared.__module__, TimestepShared.__qualname__ = __name__, "TimestepShared"
    return TimestepShared
