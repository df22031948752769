"""``python -m hf_int8_paged`` is the command ``hf-int8-paged``."""

import sys

from .tools.cli import main

sys.exit(main())
