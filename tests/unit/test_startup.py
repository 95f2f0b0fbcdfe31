"""Importing the package stays cheap and leaves torch as it is."""

import json
import subprocess
import sys

CODE = """
import json, sys, torch
def state():
    return [torch.random.get_rng_state().sum().item(), str(torch.get_default_dtype()), torch.get_num_threads(),
            torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()]
before = state()
import genmodels
print(json.dumps([before, state(), sorted(sys.modules)]))
"""


def test_importing_the_package_imports_nothing_heavy_and_sets_nothing():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after, modules = json.loads(done.stdout)
    assert before == after
    heavy = {"accelerate", "diffusers", "transformers", "nflows", "zuko", "matplotlib", "sklearn", "scipy", "h5py"}
    assert heavy & set(modules) == set(), "import heavy packages inside the functions that use them"
