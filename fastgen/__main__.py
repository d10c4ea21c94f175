"""`python -m fastgen`: the `fastgen` command without its entry point on PATH."""

import sys

from .cli.main import main

sys.exit(main())
