"""Draw samples of a run: `python sample.py runs/try --seeds 0-63 [sample.num_steps=20]`; see `--help`."""

import sys

from genmodels.commands import sample

if __name__ == "__main__":
    sys.exit(sample())
