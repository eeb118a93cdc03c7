"""``python -m jaxckpt`` is the command ``jaxckpt``."""

import sys

from jaxckpt.cli import main

sys.exit(main())
