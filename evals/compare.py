"""`python -m evals.compare`; see `--help`."""

import sys

from genmodels.evaluation.compare import main

if __name__ == "__main__":
    sys.exit(main())
