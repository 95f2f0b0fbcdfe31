"""Results as the evaluator writes them, made up, for tests of leaderboards."""

import io

import numpy as np
from PIL import Image

from genmodels.evaluation.results import Companions, describe_estimate, identify, write
from genmodels.types import Estimate

BILL = {"items": 100, "nfe": 50.0, "seconds": 2.5, "seconds_per_item": 0.025, "batch_size": 50}
BILL |= {"flops_per_item": 2_000_000, "peak_memory": 300 * 2**20}


def metric(name="FD-digits", value=4.2, stderr=0.1, entry=0, better="lower", question="sample", **more):
    """One estimate of a result."""
    estimate = Estimate(value, stderr, 100, more.pop("unit", "1"), better, more.pop("kind", "plug-in"))
    return {**describe_estimate(entry, "frechet", 1, question, name, estimate), **more}


def likelihood(value, stderr=0.01, kind="bound", entry=1, **more):
    """Bits per dimension."""
    return metric("bits_per_dim", value, stderr, entry, question="likelihood", unit="bits/dim", kind=kind, **more)


def example(run="try", metrics=None, seed=0, protocol="digits", protocol_hash="aaaa", **more):
    """A valid result; keyword arguments replace parts of it, those of `model` and `training` key by key."""
    config = {"name": run, "seed": seed, "sample": {"num_steps": 50}, "model": {"name": "flow"}} | more.pop(
        "config", {}
    )
    model = {"name": "flow", "dataset": "digits", "config_hash": "cafe00", "config": config, "seed": seed}
    model |= {
        "step": 100,
        "steps": 100,
        "samples_seen": 6400,
        "weights": "model",
        "parameters": 72842,
        "trainable": 72842,
    }
    training = {"commit": "abcdef123", "dirty": False, "hardware": "a machine", "seconds": 9.5, "world_size": 2}
    environment = {"commit": "abcdef123", "dirty": False, "versions": {"torch": "2.13.0"}, "hardware": "a machine"}
    tree = {"name": protocol, "description": more.pop("description", "Some digits.")}
    result = {
        "schema": "genmodels.result/2",
        "created_utc": more.pop("created", "2026-01-31T12:00:00Z"),
        "run": run,
        "model": model | more.pop("model", {}),
        "protocol": {
            "name": protocol,
            "version": 1,
            "hash": protocol_hash,
            "data_fingerprint": "beef",
            "tree": tree,
        },
        "answers": more.pop("answers", {"sample": {"num_steps": 50}}),
        "overridden": False,
        "metrics": [metric()] if metrics is None else metrics,
        "not_applicable": {"bits_per_dim": "needs likelihood"},
        "failures": {"sample": {"items": 0, "of": 100, "first": [], "reason": ""}},
        "cost": {"sample": BILL},
        "training": training | more.pop("training", {}),
        "environment": environment | {"device": "cpu", "threads": 1, "world_size": 1},
        "seconds": 3.0,
        "artifacts": {"items": None, "grid": None},
        **more,
    }
    return {**result, "id": identify(result)}


def store(path, result, items=None, grid=None):
    """Write a result with what lies beside it; the complete result."""
    facts = {key: value for key, value in result.items() if key not in ("artifacts", "id")}
    return write(path, facts, Companions(items or {}, grid))


def picture(seed=0, side=64):
    """A PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()
