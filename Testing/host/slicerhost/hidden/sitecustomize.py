"""Hides packages, as if they were not installed: SLICERHOST_HIDE=torch,monai (PythonSlicer passes it to the worker)."""

import importlib.metadata
import os
import sys


class _Hidden:
    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r} (hidden by SLICERHOST_HIDE)", name=name)
        return None


def hide(names):
    """Neither import nor importlib.metadata finds the packages from here on."""
    sys.meta_path.insert(0, _Hidden(names))
    plain = importlib.metadata.MetadataPathFinder.find_distributions

    def find_distributions(*args, **kwargs):
        return [d for d in plain(*args, **kwargs) if d.metadata["Name"] not in names]

    importlib.metadata.MetadataPathFinder.find_distributions = staticmethod(find_distributions)


_names = {n for n in os.environ.get("SLICERHOST_HIDE", "").split(",") if n}
if _names:
    hide(_names)
