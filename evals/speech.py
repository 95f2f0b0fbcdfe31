"""`python -m evals.speech FOLDER`; see `--help`."""

import sys

from genmodels.data.speech import main

if __name__ == "__main__":
    sys.exit(main())
