"""The bundled weights: an index with checksums, reading and writing of safetensors files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ..config import ModelConfig
from ..errors import OutputError, WeightsError, require
from ..files import replacing

FOLDER = Path(__file__).parent
INDEX = FOLDER / "index.json"


def read_index() -> dict[str, dict]:
    """Bundled models by name: file, sha256, dimension, modalities, description, card, training patients and stages."""
    return json.loads(INDEX.read_text(encoding="utf-8"))


def read_record(model: str) -> dict:
    """What is known of the training of a bundled model or a .safetensors file, ``training_patients`` for one.

    The index's entry, or the record that :func:`..training.train.train` writes beside its weights; {} without one.
    """
    if entry := read_index().get(model):
        return entry
    path = Path(model).with_suffix(".json")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def find_weights(model: str) -> tuple[str, Path]:
    """Name and path of a bundled model or of a .safetensors file.

    Raises:
        WeightsError: no such model or file, or a bundled file whose checksum is not the index's.
    """
    index = read_index()
    if model in index:
        path = FOLDER / index[model]["file"]
        if not path.is_file():
            raise WeightsError(f"the weights of {model} are missing ({path}); install ClinicalFMamba again")
        if sha256(path) != index[model]["sha256"]:
            raise WeightsError(f"the weights of {model} are corrupt (checksum of {path}); install ClinicalFMamba again")
        return model, path
    path = Path(model)
    if path.suffix != ".safetensors":
        raise WeightsError(
            f"unknown model {model!r}; bundled: {', '.join(index)}, or give the path of a .safetensors file"
        )
    if not path.is_file():
        raise WeightsError(f"{path} does not exist; bundled models: {', '.join(index)}")
    return path.stem, path


def read_tensors(path: Path, framework: str) -> tuple[dict, dict[str, str]]:
    """Tensors by name (``framework`` ``"pt"`` or ``"numpy"``) and metadata of a safetensors file.

    Raises:
        WeightsError: the file is missing, damaged or of another kind.
    """
    safetensors = require("safetensors", "reading weights")
    try:
        with safetensors.safe_open(path, framework=framework) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(
            f"{path} cannot be read as safetensors ({error}); it is damaged or another kind of file"
        ) from error
    return tensors, metadata


def load_model(path: Path):
    """The network in ``path``, in float32 and evaluation mode, and the file's metadata.

    Raises:
        WeightsError: the file is no safetensors file, or not one of ClinicalFMamba, or of another architecture.
    """
    require("torch", "running a fusion model", "torch>=2.4")
    from ..errors import InputError
    from ..models.clinicalfmamba import ClinicalFMamba

    state, metadata = read_tensors(path, "pt")
    if "config" not in metadata:
        raise WeightsError(f"{path} holds no ClinicalFMamba model: its metadata has no 'config'")
    try:
        model = ClinicalFMamba(ModelConfig.from_json(metadata["config"]))
        model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    except (InputError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(f"{path} does not fit this version's ClinicalFMamba architecture: {reason}") from error
    return model.eval(), metadata


def save_weights(model, path: Path, metadata: dict[str, str]) -> Path:
    """Write a network's weights in half precision with its configuration as metadata; atomic, same bytes each time."""
    import torch
    from safetensors.torch import save

    state = {k: v.half() if v.dtype == torch.float32 else v for k, v in model.state_dict().items()}
    state = {k: v.contiguous().cpu() for k, v in state.items()}
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create {path.parent}: {error.strerror or error}") from error
    content = save(state, {**metadata, "config": model.config.to_json()})
    with replacing(path) as temporary:
        temporary.write_bytes(sort_header(content))
    return path


def sort_header(content: bytes) -> bytes:
    """A safetensors file with the keys of its JSON header sorted: the library writes metadata in any order."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]
