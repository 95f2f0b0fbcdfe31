"""genmodels: any generative family trained, sampled, inverted and scored by the same commands."""

import importlib
import pkgutil

__version__ = "0.1.0"

# Importing every component module fills the registry. Heavy packages (accelerate, diffusers, matplotlib, …) are
# imported inside the functions that use them, so this costs little more than importing torch. Modules of `export` are
# classes of diffusers, and register nothing.
for _module in pkgutil.walk_packages(__path__, __name__ + "."):
    if not _module.name.endswith("__main__") and not _module.name.startswith(f"{__name__}.export."):
        importlib.import_module(_module.name)

from .config import Config, load  # noqa: E402
from .registry import ConfigError, register  # noqa: E402
from .types import Batch, Likelihood, Loss  # noqa: E402

__all__ = ["Batch", "Config", "ConfigError", "Likelihood", "Loss", "load", "register"]
