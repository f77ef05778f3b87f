"""FineWeb-Edu's parquet files, from the hub or from a local copy."""

from __future__ import annotations

from pathlib import Path

from train.data import dataset, hub
from train.data.files import digest
from train.data.parts import find_files

REPOSITORY = "HuggingFaceFW/fineweb-edu"


def subset_folder(subset: str | None) -> str:
    """Return a subset's folder in the repository: sample/10BT for `sample-10BT`, data/CC-MAIN-2024-10 for that dump."""
    if subset is None or subset == "default":
        return "data"
    return f"sample/{subset.removeprefix('sample-')}" if subset.startswith("sample-") else f"data/{subset}"


def local_files(path: str, subset: str | None) -> list[Path]:
    """Return the subset's parquet files in a copy of the repository; all parquet files if the folder has another layout.

    Raises:
        ValueError: There are none.
    """
    root = Path(path).expanduser()
    folder = root / subset_folder(subset)
    files = [file for file in find_files(folder if folder.is_dir() else root) if file.suffix.lower() == ".parquet"]
    if not files:
        raise ValueError(f"data.path={path} holds no .parquet file: give a folder with FineWeb-Edu's parquet files.")
    return files


def hub_files(
    subset: str | None, max_documents: int | None, cache: Path, skips_errors: bool = False
) -> tuple[str, list[Path]]:
    """Return (key of the content, files): the subset's parquet files from the hub, or its first documents as jsonl.

    Args:
        subset: The subset, such as `sample-10BT`; None for the default one.
        max_documents: Stream only this many documents; None downloads the whole files.
        cache: The cache folder, in which the jsonl files are written once.
        skips_errors: True if streamed documents without text are skipped; see `dataset.streamed`.

    Raises:
        ValueError: The hub does not answer, or the files cannot be read.
    """
    if max_documents is not None:
        asked = dataset.Asked(REPOSITORY, subset or "default", "train")
        return dataset.streamed(asked, "text", max_documents, cache, skips_errors)
    try:
        if not hub.is_reachable():
            raise ConnectionError("it does not answer")
        return _download(subset)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{REPOSITORY} ({subset or 'default'}) cannot be read from the hub ({reason}): "
            "connect to the network, or give a folder with its parquet files in data.path."
        ) from None


def _download(subset: str | None) -> tuple[str, list[Path]]:
    from huggingface_hub import snapshot_download

    folder = subset_folder(subset)
    patterns = [f"{folder}/*.parquet", f"{folder}/*/*.parquet"]
    snapshot = Path(snapshot_download(REPOSITORY, repo_type="dataset", allow_patterns=patterns))
    # The snapshot folder's name is the commit.
    return digest([REPOSITORY, snapshot.name, folder]), find_files(snapshot / folder)
