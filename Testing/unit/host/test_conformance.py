"""What real Slicer does, as far as it was recorded: the same files pass in Slicer 5.12.3 and in the stand-in host."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CONFORMANCE = next(
    (d for d in (ROOT.parent / "shared/slicer-conformance", ROOT / "shared/slicer-conformance") if d.is_dir()), None
)


@pytest.mark.skipif(CONFORMANCE is None, reason="THE HOST IS NOT COMPARED WITH SLICER: no ../shared/slicer-conformance")
def test_same_files_as_slicer(host):
    result = host(
        "--additional-module-paths",
        CONFORMANCE / "ConformanceProbe",
        "--python-script",
        CONFORMANCE / "conformance.py",
    )
    assert result.returncode == 0, result.stdout
    assert "Ran 49 tests" in result.stdout and result.stdout.rstrip().endswith("OK"), result.stdout
