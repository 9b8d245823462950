"""Are the system libraries there that Qt and VTK link to? Installs them where it may (root on Debian or Ubuntu)."""

import importlib.util
import os
import shutil
import subprocess
import sys

PACKAGES = "libgl1 libegl1 libxkbcommon0 libfontconfig1 libdbus-1-3 libglib2.0-0 libx11-6"
# In a process of its own: a library that is missing at the first import stays missing.
LOADS = [sys.executable, "-c", "import PySide6.QtWidgets, PySide6.QtUiTools, slicer"]


def missing():
    """The loader's complaint, empty where all is there."""
    result = subprocess.run(LOADS, capture_output=True, text=True, check=False)
    return result.stderr.strip().rpartition("\n")[2] if result.returncode else ""


def main():
    if importlib.util.find_spec("slicer_core") is None or not missing():
        return 0
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    if root and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-qq"], check=False, env=environment)
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES.split()]
        subprocess.run(install, check=False, env=environment)
    complaint = missing()
    if complaint:
        print(f"Qt or VTK cannot be loaded: {complaint}", file=sys.stderr)
        print(f"On Debian or Ubuntu: sudo apt-get install {PACKAGES}", file=sys.stderr)
    return 1 if complaint else 0


if __name__ == "__main__":
    sys.exit(main())
