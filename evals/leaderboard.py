"""`python -m evals.leaderboard`; see `--help`."""

import sys

from genmodels.evaluation.leaderboard import main

if __name__ == "__main__":
    sys.exit(main())
