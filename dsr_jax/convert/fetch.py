"""Sources of weights by name: local files and folders, and repositories of the Hugging Face hub."""

from pathlib import Path

from dsr_jax.core.errors import ConversionError

_WEIGHTS = ("*.safetensors", "*.bin")
"""Fetched in this order: torch files only where a repository has no safetensors."""


def fetch_snapshot(source: str) -> Path:
    """Returns a local path unchanged, and for a hub id the folder of its files in the hub's cache.

    Raises:
      ConversionError: If it is neither, or the hub cannot be reached.
    """
    path = Path(source)
    if path.exists():
        return path
    if source.count("/") != 1 or source.startswith(("/", ".")) or path.suffix:
        raise ConversionError(
            f"{source} does not exist and is no hub id", "give a folder, a file or OWNER/NAME"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConversionError(
            f"fetching {source} needs huggingface_hub",
            f"pip install 'dsr_jax[hub]', or {_fetch_elsewhere(source)}",
        ) from error
    try:
        for pattern in _WEIGHTS:
            folder = Path(snapshot_download(source, allow_patterns=["*.json", pattern]))
            if any(folder.glob(pattern)):
                break
        return folder
    # The client's errors for no network, no such repository and no permission are all OSErrors;
    # an id that cannot be one is a ValueError.
    except (OSError, ValueError) as error:
        raise ConversionError(
            f"{source} is no local folder and cannot be fetched from the hub: "
            f"{type(error).__name__}: {str(error).splitlines()[0]}",
            _fetch_elsewhere(source),
        ) from error


def _fetch_elsewhere(source: str) -> str:
    name = source.split("/")[1]
    return (
        f"on a machine with a network run `hf download {source} --local-dir {name}`, copy the "
        f"folder here and give --source {name} (gated models need `hf auth login` there first)"
    )
