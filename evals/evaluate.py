"""`python -m evals.evaluate`; see `--help`."""

import sys

from genmodels.evaluation.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
