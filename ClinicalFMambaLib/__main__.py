"""``python -m ClinicalFMambaLib``: the same as the command ``clinicalfmamba``."""

import sys

from .cli import main

sys.exit(main())
