"""Presets of training runs: YAML files with a section for each dataclass of settings."""

from __future__ import annotations

import contextlib
import importlib.resources
import typing
from collections.abc import Sequence
from pathlib import Path

import yaml

from ..errors import InputError


def list_presets(folder: str) -> list[str]:
    """Names of the presets that come with the package in ``folder``, which lies beside this module."""
    files = importlib.resources.files(__package__) / folder
    return sorted(p.name.removesuffix(".yaml") for p in files.iterdir() if p.name.endswith(".yaml"))


def load_sections(folder: str, name: str, overrides: Sequence[str], known: Sequence[str]) -> dict:
    """A preset by name, or from a path that ends with .yaml, with ``section.key=value`` overrides.

    Args:
        folder: of the presets that come with the package.
        known: the sections; those that the file lacks are empty.

    Raises:
        InputError: no such preset or section, or text that is not YAML.
    """
    bundled = importlib.resources.files(__package__) / folder / f"{name}.yaml"
    path = Path(name) if name.endswith(".yaml") else bundled
    if not path.is_file():
        listed = ", ".join(list_presets(folder))
        raise InputError(f"unknown preset {name!r}; known: {listed}, or the path of a .yaml file")
    try:
        preset = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(preset, dict) or not all(isinstance(section, dict) for section in preset.values()):
            raise InputError(f"{name} should hold the sections {', '.join(known)}, each with keys and values")
        for section in known:
            preset.setdefault(section, {})
        for override in overrides:
            key, _, value = override.partition("=")
            section, _, key = key.strip().partition(".")
            if not value or section not in preset or not key:
                raise InputError(f"override {override!r} should read section.key=value; sections: {', '.join(known)}")
            preset[section][key] = yaml.safe_load(value)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from error
    if unknown := sorted(set(preset) - set(known)):
        raise InputError(f"{name} has an unknown section {unknown[0]!r}; known: {', '.join(known)}")
    return preset


def read_section(cls, section: str, values: dict):
    """The dataclass ``cls`` from a section of a preset, its values checked; raises :class:`InputError`."""
    hints = typing.get_type_hints(cls)
    if unknown := set(values) - set(hints):
        raise InputError(f"unknown option {section}.{min(unknown)}; known: {', '.join(sorted(hints))}")
    try:
        return cls(**{key: _typed(f"{section}.{key}", value, hints[key]) for key, value in values.items()})
    except TypeError as error:
        raise InputError(f"section {section} is not complete: {error}") from error


def _typed(key: str, value, hint):
    kinds = typing.get_args(hint) if typing.get_origin(hint) is not tuple else ()
    kinds = [typing.get_origin(kind) or kind for kind in (kinds or (hint,))]
    if float in kinds and not isinstance(value, (bool, list)) and value is not None:
        with contextlib.suppress(ValueError, TypeError):
            return float(value)  # YAML takes 1e-3 for a text and 1 for an integer
    if tuple in kinds and isinstance(value, list):
        return tuple(value)
    if (isinstance(value, bool) and bool not in kinds) or not isinstance(value, tuple(kinds)):
        raise InputError(f"{key}={value!r} should be {' or '.join(kind.__name__ for kind in kinds)}")
    return value
