"""Keeping what accepted steps say of themselves while a loop takes them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..types import expand_like
from .norms import rms
from .solution import Dense, Picked, Record, Trace


class Recorder:
    """Collects the trace, the picked steps and the dense output of one integration, step by step.

    Args:
        problem: what is solved.
        tolerances: (rtol, atol) of the controller, None for bare errors.
        batch: whether E is one norm over the batch.
    """

    def __init__(self, problem: Any, tolerances: tuple[float, float] | None, batch: bool = False) -> None:
        record: Record | None = problem.record
        self.problem, self.rows, self.batch = problem, len(problem.x), batch
        self.record, self.dense = record, problem.keep_dense
        self.active = record is not None or self.dense
        given = record and (record.rtol is not None or record.atol is not None)
        self.tolerances = (record.rtol or 0.0, record.atol or 0.0) if given else tolerances
        self.reference = bool(given)
        self.entries: list[tuple[Tensor, ...]] = []
        self.polynomials: list[Tensor] = []
        self.picks = None if record is None or record.picks is None else self._begin_picks(record.picks)

    def _begin_picks(self, picks: Tensor) -> dict[str, Tensor]:
        times, x = self.problem.times.detach(), self.problem.x.detach()
        wide = times if times.ndim == 2 else times[:, None].expand(-1, self.rows)
        u = picks.to(times)
        return {
            "u": u.clone(),
            "wanted": wide[0] + u * (wide[-1] - wide[0]),
            "t": wide[0].expand_as(u).clone(),
            "s": wide[0].expand_as(u).clone(),  # a step of length 0 until there is one
            "x": x.expand(len(u), *x.shape).clone(),
        }

    def add(
        self,
        index: Tensor,
        number: Tensor,
        last: Tensor,
        t: Tensor,
        s: Tensor,
        x: Tensor,
        step: Any,
        error: Tensor | None,
        field: Any,
    ) -> None:
        """One accepted step of some rows.

        Args:
            index: [n] the rows of the batch.
            number: [n] how many steps each had taken before.
            last: [n] bool, whether the step ends the row's integration.
            t, s: [n] its two ends.
            x, step: of these rows, before and after.
            error: [n] E by the controller's norm.
        """
        if not len(index):  # every row has ended, or stands still
            return
        solver = self.problem.solver
        if self.record is not None:
            if self.reference and step.error is not None:
                error = self.norm(step.error, x, step.x)
            elif error is None and step.error is not None:
                error = self.norm(step.error, None, None)
            stiffness = solver.stiffness(t, s, x, step) if self.record.stiffness else None
            self.entries.append((index, number, t.detach(), (s - t).abs().detach(), error, stiffness))
            if self.picks is not None:
                self._pick(index, number, last, t.detach(), s.detach(), x.detach())
        if self.dense:
            if self.record is None:
                self.entries.append((index, number, t.detach(), (s - t).abs().detach(), None, None))
            self.polynomials.append(solver.interpolant(field, t, s, x, step))

    def norm(self, error: Tensor, x: Tensor | None, new: Tensor | None) -> Tensor:
        """[n] E of an error estimate; bare without states."""
        if x is not None and self.tolerances is not None:
            rtol, atol = self.tolerances
            error = error / (atol + rtol * torch.maximum(x.abs(), new.abs()))
        part = self.problem.seminorm(error)
        return rms(part.flatten()[None]).expand(len(error)) if self.batch else rms(part)

    def _pick(self, index: Tensor, number: Tensor, last: Tensor, t: Tensor, s: Tensor, x: Tensor) -> None:
        """Keep the start of this step where it is the one to keep: by its time, or by reservoir sampling."""
        picks, direction = self.picks, self.problem.direction
        if self.record.pick == "time":
            wanted = picks["wanted"][:, index]
            keep = (direction * (wanted - t) >= 0) & ((direction * (s - wanted) > 0) | last)
        else:  # the k-th step replaces what is kept with chance 1/k; u is rescaled to be uniform again
            u, k = picks["u"][:, index], number + 1.0
            open_ = ~last | (number == 0)
            keep = (u * k < 1) & open_
            again = torch.where(keep, u * k, (u * k - 1) / (k - 1).clamp(min=1))
            picks["u"][:, index] = torch.where(open_ & (number > 0), again, u)
        picks["t"][:, index] = torch.where(keep, t, picks["t"][:, index])
        picks["s"][:, index] = torch.where(keep, s, picks["s"][:, index])
        wide = keep.reshape(*keep.shape, *[1] * (x.ndim - 1))
        picks["x"][:, index] = torch.where(wide, x, picks["x"][:, index])

    def trace(self) -> Trace | None:
        if self.record is None:
            return None
        place = self._places()
        taken = self._spread(place, lambda e: torch.ones_like(e[1], dtype=torch.bool), torch.bool)
        columns = [
            None if self.entries and self.entries[0][k] is None else self._spread(place, lambda e, k=k: e[k])
            for k in range(2, 6)
        ]
        return Trace(*columns, taken)

    def picked(self) -> Picked | None:
        return self.picks and Picked(self.picks["t"], self.picks["s"], self.picks["x"])

    def interpolation(self, time: Tensor | None = None) -> Dense | None:
        """The curve, up to the times [B] where rows ended: rows that stopped may have done so within a step."""
        if not self.dense:
            return None
        place = self._places()
        starts, lengths = self._spread(place, lambda e: e[2]), self._spread(place, lambda e: e[3])
        share = torch.ones_like(lengths)
        if time is not None:
            share = ((time - starts).abs() / torch.where(lengths > 0, lengths, 1.0)).clamp(max=1.0)
            lengths = lengths * share
        times = self.problem.times.detach()
        first = times[:1].expand(1, self.rows) if times.ndim == 1 else times[:1]
        signed = self.problem.direction * lengths
        ends = torch.where(lengths > 0, starts + signed, torch.nan)
        knots = torch.cat((first, ends))
        for n in range(1, len(knots)):  # a row that took fewer steps stays where it ended
            knots[n] = torch.where(knots[n].isnan(), knots[n - 1], knots[n])
        x, count = self.problem.x, len(knots) - 1
        if not self.polynomials:
            return Dense(torch.cat((knots, knots)), x[None, None].clone())
        parts = torch.cat(self.polynomials, 1)
        k = len(parts)
        flat = x.new_zeros(k, count * self.rows, *x.shape[1:]).index_copy(1, place, parts)
        table = flat.reshape(k, count, self.rows, *x.shape[1:]).transpose(0, 1)
        if time is not None:  # θ is a share of what was kept of a step
            powers = share[:, None] ** torch.arange(k, device=x.device)[:, None]
            table = table * expand_like(powers, table).to(table.dtype)
        return Dense(knots, _hold(table, lengths == 0, x))

    def _places(self) -> Tensor:
        """[…] where each entry stands in a table of steps × rows."""
        if not self.entries:
            return torch.zeros(0, dtype=torch.int64, device=self.problem.x.device)
        return torch.cat([number * self.rows + index for index, number, *_ in self.entries])

    def _spread(self, place: Tensor, column: Callable[[tuple], Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
        """[N, B] a column of the entries as a table, 0 where a row has no such step."""
        if not self.entries:
            return torch.zeros(0, self.rows, dtype=dtype, device=self.problem.x.device)
        steps = int(max(int(number.max()) for _, number, *_ in self.entries)) + 1
        values = torch.cat([column(entry).to(dtype) for entry in self.entries])
        empty = torch.zeros(steps * self.rows, dtype=dtype, device=values.device)
        return empty.index_copy(0, place, values).reshape(steps, self.rows)


def _hold(table: Tensor, missing: Tensor, ends: Tensor) -> Tensor:
    """Coefficients [N, K, B, *shape] in which a row's missing steps are its last state, as constants."""
    if not bool(missing.any()):
        return table
    out = []
    for part, gone in zip(table, missing, strict=True):
        wide = expand_like(gone, ends)
        constant = torch.cat((ends[None], torch.zeros_like(part[1:])))
        out.append(torch.where(wide, constant, part))
        ends = torch.where(wide, ends, part.sum(0))
    return torch.stack(out)
