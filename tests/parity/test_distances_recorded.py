"""Distances against pytorch-fid, torch-fidelity, torchmetrics (recorded), prdc, scikit-learn and scipy."""

import json

import pytest

from evals.benchmarks.agreement import RECORDED, differences
from tests.parity.seeded import feature_sets


def test_the_features_are_those_that_were_recorded():
    real, drawn = feature_sets()
    checks = json.loads(RECORDED.read_text())["checks"]
    assert real.sum().item() == pytest.approx(checks["sum of real"], rel=1e-12)
    assert drawn.sum().item() == pytest.approx(checks["sum of drawn"], rel=1e-12)


def test_distances_agree():
    """float64 everywhere but in torch-fidelity's precision and recall, which are float32."""
    found = differences()
    assert sum(len(by_package) for by_package in found.values()) == 14
    for measured, by_package in found.items():
        for name, difference in by_package.items():
            single = measured.startswith("precision") and name == "torch-fidelity"
            assert difference < (1e-7 if single else 1e-11), (measured, name)
