"""Errors that a user can act on. Each message says what was expected, what came and what to do."""


class ClinicalFMambaError(Exception):
    """Base class. The command line prints the message as one line and exits with 2."""


class InputError(ClinicalFMambaError, ValueError):
    """An input cannot be used: a file, a grid, an option, a value."""


class MissingDependencyError(ClinicalFMambaError, ImportError):
    """A package that this step needs is not installed."""


class WeightsError(ClinicalFMambaError):
    """Weights are unknown, missing, corrupt or of another architecture."""


class DeviceError(ClinicalFMambaError):
    """The requested device cannot be used."""


class OutputError(ClinicalFMambaError, OSError):
    """The output cannot be written."""


class Cancelled(ClinicalFMambaError):
    """The caller asked to stop; nothing was written."""


class BatchError(ClinicalFMambaError):
    """Some cases of a batch failed; the others are done."""


class TrainingError(ClinicalFMambaError):
    """Training cannot go on."""


class Stopped(ClinicalFMambaError):
    """A signal ended a training run, and what was done is saved.

    Attributes:
        signal: its number; the command line exits with 128 + signal, as shells do.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


def require(module: str, why: str, install: str | None = None):
    """Import ``module`` or raise :class:`MissingDependencyError` that names the fix.

    Args:
        module: dotted name, such as ``"torch"``.
        why: what needs it, such as ``"fusing volumes"``.
        install: argument of ``pip install``; the module's first name by default.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = install or module.split(".")[0]
        raise MissingDependencyError(
            f"{why} needs {package}, which cannot be imported ({error}); install it with: pip install '{package}'"
        ) from error
