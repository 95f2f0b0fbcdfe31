"""Householder products and batch norm against those of nflows with the same parameters, in double precision."""

import pytest
import torch

import genmodels  # noqa: F401
from genmodels.flows.bijection import Bijection
from genmodels.registry import build

transforms = pytest.importorskip("nflows.transforms")
svd = pytest.importorskip("nflows.transforms.svd")
FEATURES, REFLECTIONS = 6, 4


def items(n, *shape, seed=0):
    return torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def bijection(name, **arguments):
    node = {"name": name, **arguments}
    return build(Bijection, node, shape=(FEATURES,), num_classes=None, condition_shape=None).double().eval()


def move(module):
    with torch.no_grad():
        for k, p in enumerate(module.parameters()):
            p.add_(items(*p.shape, seed=k) * 0.4)
    return module.double()


def agree(ours, theirs, inverse=True):
    x = items(9, FEATURES, seed=50)
    z, log_det = ours(x)
    expected, expected_log_det = theirs(x)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(log_det, expected_log_det, rtol=0, atol=1e-10)
    if inverse:
        back, back_log_det = ours.inverse(z)
        torch.testing.assert_close(back, theirs.inverse(z)[0], rtol=0, atol=1e-9)
        torch.testing.assert_close(back_log_det, theirs.inverse(z)[1], rtol=0, atol=1e-9)
        with torch.no_grad():
            torch.testing.assert_close(ours.inverse(z)[0], back, rtol=0, atol=1e-9)


@pytest.mark.parametrize("reflections", [1, 4, 7])
def test_householder(reflections):
    theirs = move(transforms.HouseholderSequence(FEATURES, reflections))
    ours = bijection("householder", reflections=reflections)
    ours.load_state_dict({"vectors": theirs.q_vectors})
    agree(ours, theirs)


def test_qr():
    theirs = move(transforms.QRLinear(FEATURES, REFLECTIONS))
    ours = bijection("qr_linear", reflections=REFLECTIONS)
    state = {"vectors": theirs.orthogonal.q_vectors, "upper": theirs.upper_entries}
    ours.load_state_dict({**state, "log_diagonal": theirs.log_upper_diag, "bias": theirs.bias})
    agree(ours, theirs, inverse=hasattr(torch, "triangular_solve"))


def test_svd():
    theirs = move(svd.SVDLinear(FEATURES, REFLECTIONS))
    ours = bijection("svd_linear", reflections=REFLECTIONS)
    state = {"first": theirs.orthogonal_1.q_vectors, "second": theirs.orthogonal_2.q_vectors, "bias": theirs.bias}
    ours.load_state_dict({**state, "log_diagonal": theirs.log_diagonal})  # theirs is log(softplus(v) + 1e-3)
    agree(ours, theirs)


def test_batch_norm_in_training_and_after():
    theirs = move(transforms.BatchNorm(FEATURES)).train()
    ours = bijection("batch_norm").train()
    theirs.running_var.fill_(1.0)  # theirs starts at 0, where eval mode multiplies by 316
    with torch.no_grad():
        ours.log_scale.copy_(theirs.weight.log())
        ours.shift.copy_(theirs.bias)
    agree(ours, theirs, inverse=False)
    torch.testing.assert_close(ours.mean, theirs.running_mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.variance, theirs.running_var, rtol=0, atol=1e-12)
    agree(ours.eval(), theirs.eval())
