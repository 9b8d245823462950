"""Words for the user that more than one place needs."""

from slicer.i18n import tr as _

METRIC_WORDS = {
    "PSNR": _("Peak signal-to-noise ratio against both sources, dB; higher is better"),
    "SCD": _("Sum of the correlations of differences; higher is better"),
    "EN": _("Entropy of the fused volume, bit; higher means more detail or more noise"),
    "MI": _("Mutual information with both sources, bit; higher is better"),
    "QABF": _("Edges of the sources that were kept, 0 to 1; higher is better"),
    "SSIM": _("Structural similarity with both sources, 0 to 1; higher is better"),
}


def durationInWords(seconds):
    """``"8 s"``, ``"3 min 20 s"``."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return _("{seconds} s").format(seconds=seconds)
    return _("{minutes} min {seconds} s").format(minutes=seconds // 60, seconds=seconds % 60)
