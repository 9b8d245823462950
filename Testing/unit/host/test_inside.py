"""The test scripts of inside/, each in a host of its own."""

from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parent / "inside").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_inside_the_host(host, script):
    result = host("--python-script", script)
    assert result.returncode == 0 and "\nOK" in result.stdout, result.stdout
