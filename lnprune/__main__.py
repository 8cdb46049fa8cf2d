"""The command line of the package: `python -m lnprune --help`."""

import sys

from lnprune.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
