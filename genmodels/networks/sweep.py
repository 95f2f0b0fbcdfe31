"""One walk through an autoregressive network in which every hidden unit is computed once, as soon as it is known.

Numbers lie with the batch innermost: [units, N].
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Staircase:
    """A linear layer W h + b of which columns (of W) and rows become known in steps, rows by the columns so far.

    Steps are grouped: what earlier groups contribute to a group is one product, so that the small product of each step
    reads only the columns of its own group. Every weight is used at most once.

    Args:
        weight: [rows, columns], both sorted by step.
        bias: [rows, 1] or [rows, N].
        rows: how many rows each step has.
        columns: how many columns become known at each step.
        group: steps per group.
    """

    def __init__(self, weight: Tensor, bias: Tensor, rows: Sequence[int], columns: Sequence[int], group: int) -> None:
        starts = range(0, len(rows), group)
        self.rows = [rows[start : start + group] for start in starts]
        self.columns = [sum(columns[start : start + group]) for start in starts]
        self.width = sum(columns)
        sizes = [sum(part) for part in self.rows]
        self.weights, self.biases = weight.split(sizes), bias.split(sizes)
        self.group, self.step, self.known = group, 0, 0
        self.buffer: Tensor | None = None

    def __call__(self, columns: Tensor) -> Tensor:
        """The rows [rows[t], N] of step t = 0, 1, …, from the columns [columns[t], N] that became known."""
        group, step = divmod(self.step, self.group)
        if self.step == 0 and not torch.is_grad_enabled():  # backward needs columns that nobody writes to
            self.buffer = columns.new_empty(self.width, columns.shape[1])
        if step == 0:
            self._open(group, columns)
        self._append(columns, step == 0)
        self.step += 1
        return torch.addmm(self.partial[step], self.steps[step][:, : len(self.recent)], self.recent)

    def _open(self, group: int, columns: Tensor) -> None:
        if group == 0:
            self.earlier = columns[:0]
        else:
            self.earlier = torch.cat((self.earlier, self.recent)) if self.buffer is None else self.buffer[: self.known]
        self.start, rows = self.known, self.rows[group]
        weight, bias = self.weights[group], self.biases[group]
        partial = torch.addmm(bias, weight[:, : self.start], self.earlier) if self.start else bias
        self.partial = partial.split(rows)
        self.steps = weight[:, self.start : self.start + self.columns[group]].split(rows)

    def _append(self, columns: Tensor, first: bool) -> None:
        end = self.known + len(columns)
        if self.buffer is None:
            self.recent = columns if first else torch.cat((self.recent, columns))
        else:
            self.buffer[self.known : end] = columns
            self.recent = self.buffer[self.start : end]
        self.known = end


class Sweep:
    """Raw parameters of one rank of variables after another, each from the values of the ranks before it.

    For every rank in turn call `parameters`, find the variables of that rank, and `feed` them. All ranks together cost
    about half a forward pass in multiplications.

    Args:
        places: [D] the variables, by rank.
        sizes: how many variables each rank has.
        layers: the layers, of which the last gives raw parameters.
        gates: what multiplies the branches of the network: factors [units, 1 or N] by step, or None.
        combine: the hidden features of one step, from what the first layer gives, the layers after it, and the gates.
        like: [B, D] what has the dtype and the batch of the variables.
    """

    def __init__(
        self,
        places: Tensor,
        sizes: Sequence[int],
        layers: Sequence[Staircase],
        gates: Sequence[Sequence[Tensor] | None],
        combine: Callable[..., Tensor],
        like: Tensor,
    ) -> None:
        self.places, self.sizes, self.gates, self.combine = places, sizes, gates, combine
        self.first, *self.layers, self.head = layers
        self.known, self.step = like.new_empty(0, len(like)), 0

    def parameters(self) -> Tensor:
        """[P, C, N] of the C variables of the current rank."""
        gates = [None if gate is None else gate[self.step] for gate in self.gates]
        h = self.combine(self.first(self.known), self.layers, gates)
        return self.head(h).unflatten(0, (-1, self.sizes[self.step]))

    def feed(self, x: Tensor) -> None:
        """Go on to the next rank, given the variables [C, N] of the current one."""
        self.known, self.step = x, self.step + 1
