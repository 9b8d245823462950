"""Stand-in for the Slicer application: `python Testing/host --testing --python-script FILE` (see README.md)."""

import atexit
import os
import sys

from slicerhost.start import main

if __name__ == "__main__":
    code = main()
    # Qt, VTK and Python cannot be taken down in an order that suits all three: what is left goes with the process.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
