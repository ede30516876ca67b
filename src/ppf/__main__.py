"""`python -m ppf`."""

import sys

from ppf.cli import main

sys.exit(main())
