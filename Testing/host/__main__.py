"""Stand-in for the Slicer application: `python Testing/host --testing --python-script FILE` (see README.md)."""

import sys

from slicerhost.start import main

if __name__ == "__main__":
    sys.exit(main())
