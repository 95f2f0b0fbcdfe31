"""`python -m evals.reference`; see `--help`."""

import sys

from genmodels.metrics.reference_command import main

if __name__ == "__main__":
    sys.exit(main())
