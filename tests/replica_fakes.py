"""Models whose gradients are no matter of course for replicas."""

import torch
from torch import nn

from genmodels.model import Model
from genmodels.types import Loss


class Adjoint(torch.autograd.Function):
    """A network whose backward pass runs it again and accumulates into its parameters itself."""

    @staticmethod
    def forward(ctx, x, net):
        ctx.net = net
        ctx.save_for_backward(x)
        with torch.no_grad():
            return net(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            torch.autograd.backward(ctx.net(x), gradient)
        return x.grad, None


class Memoryless(Model):
    """Its loss runs a network without keeping what it computed on the way."""

    def __init__(self, *, shape):
        super().__init__()
        self.shape = shape
        self.first, self.second = nn.Linear(shape[0], 5), nn.Linear(5, 3)

    def loss(self, batch, *, generator=None):
        return Loss(Adjoint.apply(self.first(batch.x), self.second).square().sum(1), {})


class Experts(Model):
    """Items whose first coordinate is positive and those where it is not each have an expert; one more has none."""

    unused_parameters = True

    def __init__(self, *, shape):
        super().__init__()
        self.shape = shape
        self.experts = nn.ModuleList(nn.Linear(shape[0], 1) for _ in range(3))

    def loss(self, batch, *, generator=None):
        value = batch.x.new_zeros(len(batch))
        for expert, mine in zip(self.experts, (batch.x[:, 0] > 0, batch.x[:, 0] <= 0), strict=False):
            if mine.any():
                value = value.index_put((mine,), (expert(batch.x[mine]) - 1).square().squeeze(1))
        return Loss(value, {"positive": (batch.x[:, 0] > 0).double().mean()})


class Careless(Experts):
    """The same, saying nothing of it."""

    unused_parameters = False
