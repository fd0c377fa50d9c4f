"""Run the command line as ``python -m dyninf``."""

import sys

from dyninf.cli import main

sys.exit(main())
