"""`python -m evals.density`; see `--help`."""

import sys

from genmodels.evaluation.density import main

if __name__ == "__main__":
    sys.exit(main())
