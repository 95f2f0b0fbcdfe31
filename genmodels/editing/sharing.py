"""Sharing of attention features: what an inversion computed, in place of what denoising would (RF-Edit)."""

import threading
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..networks.attention import Attention, Tap
from ..registry import ConfigError
from .editor import Place
from .log import Log
from .memory import Device, Disk, Host, Shelf
from .selection import WHERE, aligned, select

Tensors = Literal["q", "k", "v"]
Combine = Literal["replace", "add"]


@dataclass(frozen=True)
class Sharing:
    """Which attention features denoising takes over from inversion, and where they are kept meanwhile.

    In the m intervals next to noise, y = W h of a chosen projection becomes r S (replace) or y + r S (add) on the way
    down, with S what it was on the way up and r the ratio. The defaults are RF-Edit's, whose m ("inject") is 1 to 5.

    Args:
        steps: m, intervals next to noise whose features are shared.
        blocks: names or numbers of attention layers; "last_half" for the last ⌈18/38⌉ of them, "all" for every one.
            Numbers count what `over` leaves, from 0; a name stands for the layers in it too ("blocks.3" for
            "blocks.3.space"). Where an editor has layers besides its main ones (the double-stream blocks of FLUX), only
            names reach them.
        over: only layers whose tokens attend over these.
        tensors: which of queries, keys and values.
        combine: replace takes the stored feature, add adds it; one for all tensors, or one for each.
        ratio: factor on stored features; one for all tensors, or one for each.
        evaluations: both (all) of a step, or those amid it alone, that is all but its first: in the midpoint rule, only
            the one amid enters the result at first order, and half the memory does.
        pairing: features of the same interval and evaluation, which is RF-Edit's, or of the same time (to within 1e-6);
            null for what suits a method's solver, see `ByInversion`. By interval, what a step's first evaluation takes
            over was computed at the other end of the interval: with every step shared a round trip of the midpoint rule
            then is of order 2, not 3 (with evaluations: mid, it is 3). By time, the latest feature of that time is
            taken; the first evaluation, at noise, keeps its own if there is none.
        rows: of guided calls (on twice the items, the free ones first), whether both halves take features over or the
            prompted one alone; of several calls in one evaluation, all of them or the first alone.
        store: device keeps them where they are computed, host in (pinned) memory, disk in files.
        precision: half keeps features of more than 16 bits in float16: 11 significant bits, where bfloat16 has 8, and
            values up to 65504, beyond which there is an error.
        folder: in which a temporary one is made for the files; null for the system's.
    Raises:
        ConfigError: if a number is out of its range, or an option has no effect.
    Source: Wang et al. 2025 (Taming rectified flow for inversion and editing), section 3 (RF-Edit); Deng et al. 2024
        (FireFlow), whose code has queries, keys and added features.
    """

    steps: int = 2
    blocks: Literal["last_half", "all"] | tuple[int | str, ...] = "last_half"
    over: Literal["any", "space", "time", "all"] = "any"
    tensors: tuple[Tensors, ...] = ("v",)
    combine: Combine | tuple[Combine, ...] = "replace"
    ratio: float | tuple[float, ...] = 1.0
    evaluations: Literal["both", "mid"] = "both"
    pairing: Literal["interval", "time"] | None = None
    rows: Literal["both", "prompted"] = "both"
    store: Literal["device", "host", "disk"] = "host"
    precision: Literal["same", "half"] = "same"
    folder: str | None = None

    def __post_init__(self) -> None:
        for name in ("blocks", "tensors", "combine", "ratio"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, known in _CHOICES.items():
            _one_of(name, getattr(self, name), known)
        if self.pairing is not None:
            _one_of("pairing", self.pairing, ("interval", "time"))
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ConfigError(
                f"{WHERE}.steps: at least 1 is needed, found {self.steps}. To share nothing: share: null."
            )
        if isinstance(self.blocks, str):
            _one_of("blocks", self.blocks, ("last_half", "all"), " Names of blocks go in a list.")
        for name in ("blocks", "tensors"):
            given = getattr(self, name)
            if not given or (isinstance(given, tuple) and len(set(given)) < len(given)):
                raise ConfigError(f"{WHERE}.{name}: at least one, and each once, is needed, found {list(given)}.")
        for name in ("combine", "ratio"):
            given = getattr(self, name)
            if isinstance(given, tuple) and len(given) != len(self.tensors):
                raise ConfigError(f"{WHERE}.{name}: one, or one for each of {list(self.tensors)}, found {list(given)}.")
        for tensor in self.tensors:
            _one_of("tensors", tensor, typing.get_args(Tensors))
            _one_of("combine", self.way(tensor)[0], typing.get_args(Combine))
            if not 0 < self.way(tensor)[1] < float("inf"):
                raise ConfigError(f"{WHERE}.ratio: a positive number is needed, found {self.way(tensor)[1]}.")
        if self.folder is not None and self.store != "disk":
            raise ConfigError(f"{WHERE}.folder has no effect with store: {self.store}. Drop it, or use store: disk.")

    def way(self, tensor: str) -> tuple[str, float]:
        """How features of a tensor are combined, and their ratio."""
        at = self.tensors.index(tensor)
        combine = self.combine[at] if isinstance(self.combine, tuple) else self.combine
        return combine, self.ratio[at] if isinstance(self.ratio, tuple) else self.ratio

    def takes(self, interval: int, evaluation: int) -> bool:
        """Whether features of an evaluation are shared."""
        return interval < self.steps and (self.evaluations == "both" or evaluation > 0)


_CHOICES = {
    f.name: typing.get_args(f.type) for f in fields(Sharing) if typing.get_origin(f.type) is Literal
}  # of the options that are one word


def _one_of(name: str, value: object, known: Sequence[str], advice: str = "") -> None:
    if value not in known:
        raise ConfigError(f"{WHERE}.{name}: one of {', '.join(known)} is needed, found {value!r}.{advice}")


def estimate(
    sharing: Sharing, layers: int, tokens: int, width: int, size: int = 4, rows: int = 1, evaluations: int = 2
) -> int:
    """Bytes that features will take: steps · layers · tensors · evaluations · rows · tokens · width · size.

    Args:
        layers: how many are chosen, see `select`.
        tokens: that attend to each other, of one row.
        width: features of a token.
        size: bytes of a number as computed; at most 2 count with precision: half.
        rows: of the batch on the way up: items, twice that if they are guided, times frames for attention in each.
        evaluations: of the solver in a step.
    """
    counted = evaluations - (sharing.evaluations == "mid")
    size = min(size, 2) if sharing.precision == "half" else size
    return sharing.steps * layers * len(sharing.tensors) * counted * rows * tokens * width * size


class FeatureStore:
    """Records features of attention layers on one walk and replays them on another, by forward hooks.

    A walk is whatever has an attribute `place` that says where the present evaluation is: a `Walk`, or the scheduler of
    a pipeline. What was recorded can be replayed any number of times until the store is left; another recording takes
    its place. Where a module is called more than once in an evaluation (a pipeline that asks for the free and the
    prompted answer one after the other), the features of its first call are stored, and serve all. Where a step is
    tried again and again, those of the last try are.

    Args:
        layers: of the editor.
        num_steps: of the walks.
    Attributes:
        layers: those that are chosen.
        bytes: that its features take.
        entries: how many features it keeps: layers · tensors · evaluations · steps.
    Raises:
        ConfigError: if there are no such layers or steps, or no such folder.
    """

    def __init__(self, sharing: Sharing, layers: Sequence[Attention], num_steps: int) -> None:
        if sharing.steps > num_steps:
            raise ConfigError(
                f"{WHERE}.steps: 1 to {num_steps} are possible on a walk of {num_steps} steps, found {sharing.steps}. "
                "Share fewer (--inject-steps), or take more steps."
            )
        self.sharing, self.num_steps = sharing, num_steps
        self.layers = select(layers, sharing.blocks, sharing.over, sharing.tensors)
        self._taps = [(layer, tensor, layer.taps[tensor]) for layer in self.layers for tensor in sharing.tensors]
        self._tapped = {(layer.name, tensor): None for layer, tensor, _ in self._taps}  # each once, in order
        self._shelf = _shelf(sharing)
        self._log: Log | None = None  # of the walk that was recorded

    @property
    def bytes(self) -> int:
        return self._shelf.bytes

    @property
    def entries(self) -> int:
        return len(self._shelf)

    def __enter__(self) -> "FeatureStore":
        return self

    def __exit__(self, *error: object) -> None:
        """Forget every feature."""
        self.forget()

    def forget(self) -> None:
        """Let go of every feature, and of the files that hold them."""
        self._shelf.clear()
        self._log = None

    @contextmanager
    def recording(self, walk: Any) -> Iterator[None]:
        """Keep the features of a walk.

        Raises:
            ValueError: if the walk has other steps, nothing was there to record, or the modules are tapped already.
            OSError: if the disk is full.
        """
        self.forget()
        log = Log(walk, self.num_steps)
        try:
            with self._hooked(lambda *call: self._record(log, *call)):
                yield
            log.check_ran(self._tapped)
            if not len(self._shelf):
                raise ValueError(f"sharing: nothing was recorded: no evaluation lay in {self._window()}.")
            self._shelf.settle()
        except BaseException:
            self.forget()
            raise
        self._log = log

    @contextmanager
    def replaying(self, walk: Any) -> Iterator[None]:
        """Give the features that are kept to another walk.

        Raises:
            ValueError: if none are kept, or they come from a walk of other steps, items or tokens.
        """
        if self._log is None:
            raise ValueError("sharing: nothing has been recorded to replay. Record a walk first, with this store.")
        log = Log(walk, self.num_steps)
        log.check_same(self._log)
        with self._hooked(lambda *call: self._replay(log, *call)):
            yield
        log.check_ran(self._tapped)
        if not log.places and log.missed is not None:
            raise self._missing(log.missed)
        if not log.places:
            raise ValueError(
                f"sharing: none of the recorded features was replayed: no evaluation lay in {self._window()}."
            )
        if log.highest != self._log.highest:
            raise ValueError(
                f"sharing: features of a walk of {self._log.highest + 1} steps were replayed on one of "
                f"{log.highest + 1}. Take equal steps both ways."
            )

    @contextmanager
    def _hooked(self, act: Callable[..., Tensor | None]) -> Iterator[None]:
        """Hooks on the modules, which are gone afterwards whatever happens."""
        modules = {tap.module for _, _, tap in self._taps}
        with _LOCK:
            if any(module in _TAPPED for module in modules):
                raise ValueError(
                    "sharing: the attention layers are being recorded or replayed already. Leave that `with` first."
                )
            _TAPPED.update(modules)
        handles = []
        try:
            for layer, tensor, tap in self._taps:
                handles.append(tap.module.register_forward_hook(_hook(act, layer, tensor, tap)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            with _LOCK:
                _TAPPED.difference_update(modules)

    def _record(self, log: Log, layer: Attention, tensor: str, output: Tensor, part: slice) -> None:
        place, again = log.arrive(layer, tensor)
        feature = output.detach()[..., part]
        size = min(feature.element_size(), 2) if self.sharing.precision == "half" else feature.element_size()
        log.sizes[layer.name, tensor] = feature.numel() * size
        if log.turned():
            mid = self.sharing.evaluations == "mid"
            self._shelf.expect(log.expected(self.sharing.steps, mid, len(self._tapped)))
        if again or not self.sharing.takes(place.interval, place.evaluation):
            return
        same = log.nearest(place.time) if self.sharing.pairing == "time" else None
        slot = same or (place.interval, place.evaluation)
        log.places[slot] = place.time
        log.doubled[layer.name, *slot] = log.guided(layer, output)
        self._shelf.put((layer.name, tensor, *slot), self._kept(feature, layer, tensor))

    def _kept(self, feature: Tensor, layer: Attention, tensor: str) -> Tensor:
        """A feature as it is kept."""
        ratio = self.sharing.way(tensor)[1]
        feature = feature if ratio == 1 else ratio * feature
        if self.sharing.precision == "same" or feature.element_size() <= 2:
            return feature
        half = feature.to(torch.float16)
        if bool((half.isinf() & feature.isfinite()).any()):
            raise ValueError(
                f"sharing: '{tensor}' of {layer.name} has numbers of {float(feature.abs().max()):.3g}, beyond float16. "
                f"Use {WHERE}.precision: same."
            )
        return half

    def _replay(self, log: Log, layer: Attention, tensor: str, output: Tensor, part: slice) -> Tensor | None:
        place, again = log.arrive(layer, tensor)
        prompted = self.sharing.rows == "prompted"
        if not self.sharing.takes(place.interval, place.evaluation) or (again and prompted):
            return None
        slot = self._source(place)
        if slot is None:
            log.missed = place
            return None
        if (layer.name, tensor, *slot) not in self._shelf:
            raise ValueError(
                f"sharing: '{tensor}' of {layer.name} was not recorded at evaluation {slot[1]} of step {slot[0]} from "
                "noise: another part of the model ran there. Use pairing: time, evaluations: mid, or other blocks."
            )
        stored = self._shelf.get((layer.name, tensor, *slot))
        out = output.clone()
        target = out[..., part]
        was = self._log.doubled[layer.name, *slot]
        try:
            rows, first = aligned(stored, len(target), log.guided(layer, output), was, prompted)
            if rows.shape != target[first:].shape:
                raise ValueError("tokens or features differ")
        except ValueError as error:
            raise ValueError(
                f"sharing: '{tensor}' of {layer.name} was recorded with shape {list(stored.shape)} and is to be "
                f"replayed on {list(target.shape)}: {error}. Use items of one size and number both ways."
            ) from None
        if self.sharing.way(tensor)[0] == "replace":
            target[first:].copy_(rows, non_blocking=True)
        else:
            target[first:].add_(rows.to(target.device, target.dtype, non_blocking=True))
        log.places[place.interval, place.evaluation] = place.time
        return out

    def _window(self) -> str:
        steps = f"the {self.sharing.steps} steps next to noise"
        late = ", after the first of its step; evaluations: mid needs a solver that has more than one a step"
        return f"{steps}{late}" if self.sharing.evaluations == "mid" else steps

    def _source(self, place: Place) -> tuple[int, int] | None:
        """Which recorded evaluation a place takes features from; None for the first one, at noise, if it finds none."""
        recorded, slot = self._log.places, (place.interval, place.evaluation)
        if self.sharing.pairing == "time":
            slot = self._log.nearest(place.time)
        if slot in recorded:
            return slot
        if (place.interval, place.evaluation) == (0, 0):
            return None
        raise self._missing(place)

    def _missing(self, place: Place) -> ValueError:
        known = ", ".join(f"step {i} evaluation {e} at t = {t:.6g}" for (i, e), t in sorted(self._log.places.items()))
        return ValueError(
            f"sharing: evaluation {place.evaluation} of step {place.interval} from noise, at t = {place.time:.6g}, has "
            f"nothing to take over by pairing: {self.sharing.pairing or 'interval'}. Recorded: {known}. Use the same "
            "solver and times both ways, another pairing, or more steps."
        )


_TAPPED: WeakSet[nn.Module] = WeakSet()  # modules that some store has hooks on
_LOCK = threading.Lock()


def _hook(act: Callable[..., Tensor | None], layer: Attention, tensor: str, tap: Tap) -> Callable[..., Tensor | None]:
    def hook(module: nn.Module, inputs: object, output: object) -> Tensor | None:
        i, n = tap.part
        if not isinstance(output, Tensor) or output.shape[-1] % n:
            found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"sharing: '{tensor}' of {layer.name} must be part {i} of {n} equal ones of the last axis of a tensor; "
                f"its module gave {found}."
            )
        size = output.shape[-1] // n
        return act(layer, tensor, output, slice(i * size, (i + 1) * size))

    return hook


def _shelf(sharing: Sharing) -> Shelf:
    if sharing.store == "disk":
        return Disk(sharing.folder)
    return Host() if sharing.store == "host" else Device()
