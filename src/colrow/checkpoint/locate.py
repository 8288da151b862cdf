"""Where a model's weights are: from what a user types to the one file that opens them."""

from __future__ import annotations

import re
from pathlib import Path

from colrow.checkpoint.model_directory import check_directory
from colrow.checkpoint.run_directory import is_training_run
from colrow.files import check_regular

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ACCEPTED = (
    f"a directory with {SINGLE_FILE} or {INDEX_FILE}, a .safetensors file, a .gguf file, "
    "or a Hugging Face id that is in the local cache"
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WEIGHT_SUFFIXES = {".safetensors", ".gguf", ".json"}
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_PICKLE_REFUSED = (
    "is a pickle, which can run any code when it is loaded, so it is not read. If you trust it, "
    "convert it once: AutoModelForCausalLM.from_pretrained(DIRECTORY).save_pretrained(NEW) with "
    "transformers writes safetensors"
)


def resolve_model_path(path_or_id: str | Path) -> Path:
    """The existing file or directory that a path or a locally cached hub id stands for.

    A path on disk wins over a hub id of the same spelling. Never downloads. The files of a
    directory by which a model is read are looked at first, see :func:`check_directory`.

    Raises:
        ValueError: neither exists here; the message says what was tried and what is accepted. Or
            something there is not a regular file of that directory.
    """
    path = Path(path_or_id).expanduser()
    if path.exists():
        _check(path)
        return path
    tried = f"no file or directory {str(path.absolute())!r}"
    is_weight_file = path.suffix in _WEIGHT_SUFFIXES | _PICKLE_SUFFIXES
    if isinstance(path_or_id, str) and _HUB_ID.fullmatch(path_or_id) and not is_weight_file:
        cached, cache_tried = cached_snapshot(path_or_id)
        if cached is not None:
            _check(cached)
            return cached
        tried += f", and {cache_tried}"
    raise ValueError(f"there is no model at {str(path_or_id)!r}: {tried}. Accepted: {ACCEPTED}")


def _check(path: Path) -> None:
    """The directory that is meant, or the file that the user named with the directory around it."""
    if path.is_dir():
        check_directory(path)
    else:
        check_regular(path)  # which may be anywhere: the user named it
        check_directory(path.parent, named=path.name)


def find_weights(path: Path) -> Path:
    """The file to open for the weights at an existing path.

    That is ``model.safetensors`` or else ``model.safetensors.index.json`` of a directory, or a
    ``.safetensors`` or ``.gguf`` file itself.

    Raises:
        ValueError: no weights there, only pickled ones, or a file of another kind.
    """
    if not path.is_dir():
        if path.name == INDEX_FILE or path.suffix in (".safetensors", ".gguf"):
            return path
        if path.suffix in _PICKLE_SUFFIXES:
            raise ValueError(f"{path} {_PICKLE_REFUSED}")
        raise ValueError(f"{path} is not a weight file that can be read. Accepted: {ACCEPTED}")
    for name in (SINGLE_FILE, INDEX_FILE):
        if (path / name).exists():
            return path / name
    if is_training_run(path):
        raise ValueError(
            f"{path} is a training run, and its weights are in checkpoints: write a model first: "
            f"colrow export {path} DIRECTORY"
        )
    entries = sorted(path.iterdir())
    others = [entry.name for entry in entries if entry.suffix in (".safetensors", ".gguf")]
    if others:
        raise ValueError(
            f"directory {path} has neither {SINGLE_FILE} nor {INDEX_FILE}, but {', '.join(others)};"
            " give the path of the file itself"
        )
    pickles = [entry.name for entry in entries if entry.suffix in _PICKLE_SUFFIXES]
    if pickles:
        raise ValueError(f"directory {path} holds only {pickles[0]}, which {_PICKLE_REFUSED}")
    raise ValueError(f"directory {path} holds no weights. Accepted: {ACCEPTED}")


def damaged_file(path: Path, file_format: str, cause: object, remedy: str = "") -> ValueError:
    """The error for a file that does not parse as its name says, with one more way to mend it."""
    check_regular(path)
    with path.open("rb") as file:
        is_pointer = file.read(24) == b"version https://git-lfs."
    if is_pointer:
        return ValueError(f"{path} is only a Git LFS pointer; run 'git lfs pull' to get the file")
    return ValueError(
        f"{path} is not a complete {file_format} file ({cause}); "
        + ", ".join(filter(None, ("copy or download it again", remedy)))
    )


def cached_snapshot(hub_id: str) -> tuple[Path | None, str]:
    """The snapshot of a hub id in the local cache, or None, and what was tried."""
    try:
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError:
        return None, "huggingface_hub is not installed, so its cache was not searched"
    try:
        return Path(snapshot_download(hub_id, local_files_only=True)), ""
    except (HFValidationError, LocalEntryNotFoundError):
        return None, (
            f"no snapshot of {hub_id!r} in the cache {str(constants.HF_HUB_CACHE)!r} "
            f"(where it is on the hub, `hf download {hub_id}` fetches it)"
        )
