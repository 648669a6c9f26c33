"""`python -m clipjax COMMAND ...` is the console script."""

import sys

from clipjax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
