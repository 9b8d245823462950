"""The module `slicer.packaging` (Slicer 5.12): never installs anything.

A test that wants an installation replaces ``slicer.packaging.pip_install`` (slicer.util.pip_install calls it) or
``slicer.util.pip_install``.
"""

import importlib.metadata
import sys
import types

import slicer
from packaging.requirements import Requirement


def pip_install(
    requirements,
    constraints=None,
    no_deps_requirements=None,
    skip_packages=None,
    blocking=True,
    show_progress=True,
    requester=None,
    logCallback=None,
    completedCallback=None,
):
    raise RuntimeError(f"The stand-in host never installs packages: {requirements}")


def pip_uninstall(requirements, blocking=True, logCallback=None, completedCallback=None):
    raise RuntimeError(f"The stand-in host never uninstalls packages: {requirements}")


def pip_check(req):
    """True where all requirements are there in a version that fits."""
    if isinstance(req, str):
        req = req.split()
    for r in req if isinstance(req, (list, tuple)) else [req]:
        r = Requirement(r) if isinstance(r, str) else r
        if r.extras:
            raise NotImplementedError("The stand-in host does not check extras")
        if r.marker is not None and not r.marker.evaluate():
            continue
        try:
            if importlib.metadata.version(r.name) not in r.specifier:
                return False
        except importlib.metadata.PackageNotFoundError:
            return False
    return True


def install():
    module = types.ModuleType("slicer.packaging")
    for f in (pip_install, pip_uninstall, pip_check):
        setattr(module, f.__name__, f)
    sys.modules["slicer.packaging"] = module
    slicer.packaging = module
