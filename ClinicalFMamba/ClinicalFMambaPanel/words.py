"""Words for the user that more than one place needs."""

import re

from slicer.i18n import tr as _

METRIC_WORDS = {
    "PSNR": _("Peak signal-to-noise ratio against both sources, dB; higher is better"),
    "SCD": _("Sum of the correlations of differences; higher is better"),
    "EN": _("Entropy of the fused volume, bit; higher means more detail or more noise"),
    "MI": _("Mutual information with both sources, bit; higher is better"),
    "QABF": _("Edges of the sources that were kept, 0 to 1; higher is better"),
    "SSIM": _("Structural similarity with both sources, 0 to 1; higher is better"),
}


# What the engine tells who works at the command line to do, and where the panel has it; the longer ones first.
_IN_THE_PANEL = (
    ("use --resample to interpolate B onto A's grid", _('switch on "Resample B onto A"')),
    ("raise --max-memory", _('raise the "Memory limit" in the section Advanced')),
    ("give one with --model NAME or the path of a .safetensors file", _('choose one at "Model"')),
    ("give a 2D model with --model", _('choose a 2D model at "Model"')),
    ("(--model mri-ct-2d)", _('(mri-ct-2d at "Model")')),
    ("use --device cpu or auto", _('choose "CPU" or "Automatic" at "Device"')),
    ("use --device cpu", _('choose "CPU" at "Device"')),
)


def inThePanel(message):
    """A message of the engine with the panel's ways out in place of those of the command line."""
    for there, here in _IN_THE_PANEL:
        message = message.replace(there, here)
    # Never by pip in Slicer: it would pick another build, or replace packages that Slicer was built with.
    again = _('reinstall PyTorch in the module "PyTorch Utils" and restart Slicer')
    return re.sub(r"install (it )?with: pip install .*", lambda _match: again, message)


def durationInWords(seconds):
    """``"8 s"``, ``"3 min 20 s"``."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return _("{seconds} s").format(seconds=seconds)
    return _("{minutes} min {seconds} s").format(minutes=seconds // 60, seconds=seconds % 60)
