"""`python -m attnspan` is `attnspan`."""

import sys

from attnspan.cli import main

sys.exit(main())
