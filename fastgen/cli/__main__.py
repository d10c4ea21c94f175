"""`python -m fastgen.cli`: the `fastgen` command without its entry point on PATH."""

import sys

from .main import main

sys.exit(main())
