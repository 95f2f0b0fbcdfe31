"""Importing the package stays cheap and leaves torch as it is."""

import json
import subprocess
import sys
from pathlib import Path

CODE = """
import json, sys, torch
def state():
    return [torch.random.get_rng_state().sum().item(), str(torch.get_default_dtype()), torch.get_num_threads(),
            torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()]
before = state()
import genmodels
after, imported = state(), sorted(sys.modules)
from genmodels.commands import train
statuses = [train(words.split()) for words in ("--list", "--describe network.mlp", "none.yaml", "--list nonsense",
                                              "configs/digits/flow_matching.yaml train.stepz=3")]
print(json.dumps([before, after, imported, statuses, sorted(sys.modules)]))
"""
HEAVY = {"accelerate", "diffusers", "transformers", "nflows", "zuko", "matplotlib", "sklearn", "scipy", "h5py"}
ROOT = Path(__file__).parents[2]


def test_importing_listing_and_mistakes_import_nothing_heavy_and_set_nothing():
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    before, after, imported, statuses, modules = json.loads(done.stdout.splitlines()[-1])
    assert before == after
    assert HEAVY & set(imported) == set(), "import heavy packages inside the functions that use them"
    assert statuses == [0, 0, 2, 2, 2]
    assert (HEAVY | {"PIL", "torchdiffeq"}) & set(modules) == set()
