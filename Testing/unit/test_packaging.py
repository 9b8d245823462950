"""What is listed for packaging is what is there: Slicer and setuptools leave out silently what no list names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 or later reads pyproject.toml")

ROOT = Path(__file__).resolve().parents[2]
PACKAGED = (".py", ".ui", ".svg", ".png", ".json", ".safetensors", ".md", ".yaml")


def listed(cmake, variable):
    """The files of ``set(variable …)`` in a CMakeLists.txt."""
    text = re.sub(r"#.*", "", (ROOT / cmake).read_text(encoding="utf-8"))
    variables = dict(re.findall(r"set\((\w+)\s+([^)]*)\)", text))
    words = variables[variable].split()
    return [re.sub(r"\$\{(\w+)\}", lambda m: variables[m[1]].strip(), word) for word in words]


def there(folder, *, python):
    found = []
    for path in sorted((ROOT / folder).rglob("*")):
        name = path.relative_to(ROOT / folder).as_posix()
        hidden = "__pycache__" in name or "/." in f"/{name}"
        if path.is_file() and path.suffix in PACKAGED and not hidden and (path.suffix == ".py") == python:
            found.append(name)
    return found


@pytest.mark.parametrize(
    "folder, variable, python",
    [
        ("ClinicalFMamba", "MODULE_PYTHON_SCRIPTS", True),
        ("ClinicalFMamba", "MODULE_PYTHON_RESOURCES", False),
        ("ClinicalFMambaLib", "LIBRARY_PYTHON_SCRIPTS", True),
        ("ClinicalFMambaLib", "LIBRARY_RESOURCES", False),
    ],
)
def test_cmake_lists_every_file_once(folder, variable, python):
    names = listed(f"{folder}/CMakeLists.txt", variable)
    missing, gone = set(there(folder, python=python)) - set(names), set(names) - set(there(folder, python=python))
    assert not missing, f"add to {variable} in {folder}/CMakeLists.txt: {' '.join(sorted(missing))}"
    assert not gone, f"remove from {variable} in {folder}/CMakeLists.txt: {' '.join(sorted(gone))}"
    assert len(names) == len(set(names))


def test_cmake_lists_every_self_test():
    text = (ROOT / "Testing/Python/CMakeLists.txt").read_text(encoding="utf-8")
    names = set(re.findall(r"ClinicalFMamba\w+Test", text))
    assert names == {path.stem for path in (ROOT / "Testing/Python").glob("*Test.py")}


def test_pyproject_lists_every_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for path in (ROOT / "ClinicalFMambaLib").rglob("__init__.py")
    }
    assert set(project["tool"]["setuptools"]["packages"]) == packages
    kinds = {
        (package, Path(pattern).suffix)
        for package, patterns in project["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
    }
    for name in there("ClinicalFMambaLib", python=False):
        folder = (ROOT / "ClinicalFMambaLib" / name).parent
        while not (folder / "__init__.py").is_file():
            folder = folder.parent
        package = folder.relative_to(ROOT).as_posix().replace("/", ".")
        assert (package, Path(name).suffix) in kinds, f"pyproject.toml packages no {Path(name).suffix} of {package}"


def test_no_module_at_the_root():
    assert list(ROOT.glob("*.py")) == [], "Slicer takes each .py beside CMakeLists.txt for a module"


def test_extension_metadata_agree():
    cmake = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    entry = json.loads((ROOT / "ClinicalFMamba.json").read_text(encoding="utf-8"))
    assert re.search(r"project\((\w+)", cmake)[1] == "ClinicalFMamba"
    variables = dict(re.findall(r'set\((EXTENSION_\w+) "([^"]*)"\)', cmake))
    assert entry["build_dependencies"] == variables["EXTENSION_DEPENDS"].split()
    assert set(entry) <= {
        "$schema", "build_dependencies", "build_subdirectory", "category", "enabled", "scm_revision", "scm_type",
        "scm_url", "tier",
    }  # fmt: skip
    repository = entry["scm_url"].removesuffix(".git")
    owner = repository.removeprefix("https://github.com/")
    for url in (variables["EXTENSION_ICONURL"], *variables["EXTENSION_SCREENSHOTURLS"].split()):
        prefix = f"https://raw.githubusercontent.com/{owner}/main/"
        assert url.startswith(prefix)
        assert (ROOT / url.removeprefix(prefix)).is_file(), url
