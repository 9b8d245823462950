"""Where ClinicalFMambaLib is: Slicer puts only the folder of the module file on sys.path."""

import sys
from pathlib import Path


def libraryFolder():
    """The folder that holds ClinicalFMambaLib: beside the module where it is installed, above it in a source tree."""
    folder = Path(__file__).resolve().parents[1]
    for candidate in (folder, folder.parent):
        if (candidate / "ClinicalFMambaLib" / "__init__.py").is_file():
            return candidate
    raise ImportError(f"ClinicalFMambaLib is neither in {folder} nor in {folder.parent}; install the extension again")


def addLibraryToPath():
    """Make ``import ClinicalFMambaLib`` work; last on sys.path, so that nothing beside it hides another package."""
    folder = str(libraryFolder())
    if folder not in sys.path:
        sys.path.append(folder)
