"""`python -m nestling`: the command line, also from a checkout that is not installed."""

import sys

from nestling.cli.main import main

sys.exit(main())
