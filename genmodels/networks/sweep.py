"""One walk through an autoregressive network in which every hidden unit is computed once, as soon as it is known.

Numbers lie with the batch innermost: [units, N].
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Staircase:
    """A linear layer W h + b of which columns (of W) and rows become known in steps: those of step t need no later ones.

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
        sizes = [sum(part) for part in self.rows]
        self.weights, self.biases = weight.split(sizes), bias.split(sizes)
        self.group, self.step = group, 0

    def __call__(self, columns: Tensor) -> Tensor:
        """The rows [rows[t], N] of step t = 0, 1, …, from the columns [columns[t], N] that became known."""
        group, step = divmod(self.step, self.group)
        if step == 0:
            self._open(group, columns)
        else:
            self.recent = torch.cat((self.recent, columns))
        self.step += 1
        return torch.addmm(self.partial[step], self.steps[step][:, : len(self.recent)], self.recent)

    def _open(self, group: int, columns: Tensor) -> None:
        self.earlier = columns[:0] if group == 0 else torch.cat((self.earlier, self.recent))
        self.recent = columns
        known, rows = len(self.earlier), self.rows[group]
        weight, bias = self.weights[group], self.biases[group]
        partial = torch.addmm(bias, weight[:, :known], self.earlier) if known else bias
        self.partial = partial.split(rows)
        self.steps = weight[:, known : known + self.columns[group]].split(rows)


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
