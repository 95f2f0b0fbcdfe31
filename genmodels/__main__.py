"""`python -m genmodels train|sample|evaluate|leaderboard|plots …`: the commands of an installed package."""

import sys

from .commands import main

if __name__ == "__main__":
    sys.exit(main())
