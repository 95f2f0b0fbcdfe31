"""Train a configuration: `python train.py configs/digits/flow_matching.yaml [key=value …]`; see `--help`."""

import sys

from genmodels.commands import train

if __name__ == "__main__":
    sys.exit(train())
