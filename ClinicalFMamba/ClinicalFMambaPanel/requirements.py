"""The Python packages that fusing needs, and installing them after one question.

torch comes through the PyTorch extension, which picks the build for the machine's GPU; the rest through Slicer's pip.
What Slicer was built with (numpy, SimpleITK, …) is never changed: a replaced SimpleITK keeps Slicer from starting.
"""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import logging
import os
import re
import tempfile
from pathlib import Path

import slicer
from slicer.i18n import tr as _

# Whatever a package asks for, pip leaves these alone.
FROZEN = ("numpy", "SimpleITK", "scipy", "requests", "vtk", "pydicom", "pillow")


@dataclasses.dataclass(frozen=True)
class Requirement:
    """A package: its name, the lowest version that will do, what its download takes, what it is for.

    An optional one is installed along with others; fusing works without it.
    """

    name: str
    minimum: str
    size: str
    purpose: str
    isOptional: bool = False

    def __str__(self):
        return f"{self.name}>={self.minimum}"

    @property
    def isMet(self):
        # Importing torch takes seconds and, in a broken installation, may end Slicer.
        try:
            installed = importlib.metadata.version(self.name)
        except importlib.metadata.PackageNotFoundError:
            return False
        return _numbers(installed) >= _numbers(self.minimum)


def _numbers(version):
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0])[:2])


TORCH = Requirement("torch", "2.4", "0.2 to 3 GB", "PyTorch, with torchvision; runs the network")
SAFETENSORS = Requirement("safetensors", "0.4", "0.5 MB", "reads the network's weights")
# Measured without a GPU: 2D models take an eighth of the time, 3D models less than half.
NUMBA = Requirement(
    "numba", "0.60", "60 MB", "optional; makes fusing without a GPU 2 to 8 times faster", isOptional=True
)


class InstallationError(RuntimeError):
    """Something could not be installed; the message says what and what to do."""


class Requirements:
    """What is there, and how to get the rest.

    Args:
        requirements: all that fusing needs, and optional ones.
        installTorch: takes a version requirement such as ``">=2.4"``; returns None when it was declined.
        pipInstall: takes the arguments of ``pip install`` as one text.
        confirm: asks a question, returns whether the answer was yes.
    """

    def __init__(self, requirements=(TORCH, SAFETENSORS, NUMBA), installTorch=None, pipInstall=None, confirm=None):
        self._requirements = requirements
        self.isInstalling = False
        self._installTorch = installTorch
        self._pipInstall = pipInstall or slicer.util.pip_install
        self._confirm = confirm or slicer.util.confirmOkCancelDisplay

    def missing(self):
        """What fusing lacks; nothing is imported, nothing asked from the network."""
        return [requirement for requirement in self._requirements if not (requirement.isMet or requirement.isOptional)]

    def describeMissing(self):
        """One sentence, or ``""``."""
        names = [str(requirement) for requirement in self.missing()]
        return _("Not installed yet: {names}").format(names=", ".join(names)) if names else ""

    def ensure(self, onChange=lambda: None):
        """Install what is missing after one question that lists all of it; whether everything is there now.

        Args:
            onChange: called when :attr:`isInstalling` has become another.

        Raises:
            InstallationError: it was agreed to and failed.
        """
        missing = self.missing()
        if not missing:
            return True
        if self._installTorch is None and any(requirement.name == "torch" for requirement in missing):
            # Before the question: there is nothing to agree to without it.
            self._installTorch = _torchInstaller()
        missing += [r for r in self._requirements if r.isOptional and not r.isMet]
        lines = "\n".join(f"  •  {r} ({r.purpose}, {r.size})" for r in missing)
        question = _(
            "ClinicalFMamba needs Python packages that are not installed yet:\n\n{packages}\n\n"
            "They are downloaded from pypi.org or pytorch.org once and kept in Slicer's own folder; "
            "no image leaves this computer. Install them now?"
        ).format(packages=lines)
        if not self._confirm(question, windowTitle=_("ClinicalFMamba set-up")):
            logging.info("ClinicalFMamba: the installation was declined")
            return False
        # Slicer's pip lets the event loop run meanwhile, so that the user can go on clicking.
        self.isInstalling = True
        try:
            onChange()
            for requirement in missing:
                try:
                    self._install(requirement)
                except InstallationError as error:
                    if not requirement.isOptional:
                        raise
                    # Such as none for this Slicer's numpy, which stays.
                    logging.warning("ClinicalFMamba works without %s: %s", requirement.name, error)
        finally:
            self.isInstalling = False
            onChange()
        importlib.invalidate_caches()
        left = ", ".join(str(requirement) for requirement in self.missing())
        if left:
            raise InstallationError(
                _("{names} still missing after the installation; restart Slicer").format(names=left)
            )
        return True

    def _install(self, requirement):
        try:
            with _pinned():
                if requirement.name == "torch":
                    if self._installTorch(f">={requirement.minimum}") is None:
                        raise InstallationError(_("the PyTorch extension did not install torch"))
                else:
                    self._pipInstall(str(requirement))
        except InstallationError:
            raise
        except Exception as error:
            raise InstallationError(
                _("{name} could not be installed ({error}); check the internet connection and Slicer's log").format(
                    name=requirement.name, error=" ".join(str(error).split())
                )
            ) from error


@contextlib.contextmanager
def _pinned():
    """Whoever starts pip now, the PyTorch extension among them: it leaves alone what Slicer was built with."""
    lines = []
    for name in FROZEN:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            lines.append(f"{name}=={importlib.metadata.version(name)}")
    before = os.environ.get("PIP_CONSTRAINT")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder).resolve() / "constraints.txt"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        # As an address: pip splits the variable at spaces, which a user's folder may have.
        os.environ["PIP_CONSTRAINT"] = " ".join(filter(None, (before, path.as_uri())))
        try:
            yield
        finally:
            if before is None:
                del os.environ["PIP_CONSTRAINT"]
            else:
                os.environ["PIP_CONSTRAINT"] = before


def _torchInstaller():
    try:
        import PyTorchUtils
    except ImportError as error:
        raise InstallationError(
            _(
                "torch is not installed, and the extension PyTorch, which installs it, is missing: install it with the "
                "Extensions Manager, restart Slicer and click Fuse again"
            )
        ) from error
    # The question has been asked.
    return lambda version: PyTorchUtils.PyTorchUtilsLogic().installTorch(
        askConfirmation=False, torchVersionRequirement=version
    )
