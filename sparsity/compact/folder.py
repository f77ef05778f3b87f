"""Conversion of a transformers folder to the compact form and back. The new folder appears only once it is complete."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsity.common.files import check_room, folder_aside, free_bytes
from sparsity.common.safetensors_header import parse_json, read_header
from sparsity.compact.contents import METHOD, Stored, check_version, read_contents, version_of
from sparsity.compact.files import Progress, check_plain, compact_file, expand_file
from sparsity.compact.pieces import FLOATS, How
from sparsity.compact.rounding import Rounding

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
ROOM_FOR_SMALL_FILES = 1 << 20
_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".msgpack",
    ".gguf", ".onnx",
)  # fmt: skip
"""Endings of files that are not copied: other weights, and files that may be pickles."""
_PICKLE_STARTS = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))


@dataclass
class Folder:
    """The result of a conversion: what it read and wrote."""

    source: Path
    out: Path
    tensors: list[Stored] = field(default_factory=list)
    source_bytes: int = 0
    out_bytes: int = 0
    """Bytes of the weight files, headers included."""
    not_copied: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a folder by name, and the index if there is one."""

    folder: Path
    names: tuple[str, ...]
    index: dict[str, Any] | None

    @property
    def paths(self) -> list[Path]:
        """The paths of the files, in the order of their names."""
        return [self.folder / name for name in self.names]

    @property
    def num_bytes(self) -> int:
        """The size of all files together, without the index."""
        return sum(path.stat().st_size for path in self.paths)


def compact_folder(
    source: str | Path,
    out: str | Path,
    dtype: str | None = None,
    progress: Callable[[int], Progress] | None = None,
    rounding: Rounding | None = None,
    row_starts: bool = False,
) -> Folder:
    """Write the compact form of the transformers folder `source` to the new folder `out`.

    Args:
        source: A transformers folder with safetensors.
        out: A folder that does not exist; it appears only once it is complete.
        dtype: float32, bfloat16, float16 or float64; weights are converted to it first. None keeps every bit.
        progress: Called with the total number of bytes; its result is called with the bytes done since the last call.
        rounding: How the kept values of sparse tensors are rounded to 8 or 4 bits; None keeps every bit.
        row_starts: Whether to also write the number of kept weights before each row.

    Raises:
        ValueError: The source cannot be converted, `out` exists, or its disk is too full.
    """
    source, out = checked_places(source, out)
    files, config = weight_files(source), read_config(source)
    final = _checked_dtype(dtype)
    how = How(final, rounding, row_starts)
    if METHOD in _quantization(config):
        raise ValueError(f"{source} is compact already: load it after `import sparsity.compact`, or expand it.")
    if method := _quantization(config):
        raise ValueError(f"{source} is quantized by {method}: the compact format takes plain weights.")
    headers = {path: read_header(path) for path in files.paths}
    for path, header in headers.items():
        check_plain(path, header)
    _check_index(files, {path.name: list(header.entries) for path, header in headers.items()})
    # No tensor grows by more than its name, so the exact size is computed only if room is short.
    room = 2 * files.num_bytes if final in ("F32", "F64") or row_starts else files.num_bytes
    if free_bytes(out) < room + ROOM_FOR_SMALL_FILES:
        room = sum(tensor.stored_bytes for path in files.paths for tensor in compact_file(path, None, how=how))
    _check_room(out, room)
    config["quantization_config"] = {"quant_method": METHOD, "version": 1}
    if dtype is not None:
        config.update({key: dtype for key in ("dtype", "torch_dtype") if key in config} or {"dtype": dtype})
    done = (
        progress(sum(e.num_bytes for header in headers.values() for e in header.entries.values())) if progress else int
    )
    return _converted(
        source,
        out,
        files,
        config,
        lambda path, target: compact_file(path, target, progress=done, how=how),
        _stored_names,
    )


def expand_folder(source: str | Path, out: str | Path, progress: Callable[[int], Progress] | None = None) -> Folder:
    """Write the plain form of the compact folder `source` to the new folder `out`, for use without this package.

    Every tensor gets back its original bits, unless its values were converted or rounded when it was made compact.

    Args:
        source: A compact folder.
        out: A folder that does not exist; it appears only once it is complete.
        progress: Called with the total number of bytes; its result is called with the bytes done since the last call.

    Raises:
        ValueError: The source is not compact or is damaged, `out` exists, or its disk is too full.
    """
    source, out = checked_places(source, out)
    files, config = weight_files(source), read_config(source)
    if METHOD not in _quantization(config):
        raise ValueError(f"{source} is not compact: its config.json names no {METHOD}, so it loads as it is.")
    check_version(config["quantization_config"].get("version"), source / CONFIG)
    contents = {path.name: read_contents(path)[1] for path in files.paths}
    _check_index(files, {name: _stored_names(tensors) for name, tensors in contents.items()})
    if left := {path.name for path in source.glob("*.safetensors")} - set(files.names):
        raise ValueError(f"{source} holds {min(left)}, which its index does not name: copy the folder again.")
    dense_bytes = sum(tensor.dense_bytes for tensors in contents.values() for tensor in tensors)
    _check_room(out, dense_bytes)
    del config["quantization_config"]
    done = progress(dense_bytes) if progress else int
    return _converted(
        source, out, files, config, lambda path, target: expand_file(path, target, done),
        lambda tensors: [tensor.name for tensor in tensors], is_dense=True,
    )  # fmt: skip


def checked_places(source: str | Path, out: str | Path) -> tuple[Path, Path]:
    """Return both as paths; raise a ValueError if `source` is not a folder or `out` exists."""
    source, out = Path(source), Path(out)
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder: give a transformers folder, such as a run's model/.")
    if source.resolve() == out.resolve():
        raise ValueError(f"{out} is the model's own folder: give another for the result.")
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists: nothing is overwritten, so remove it or give another folder.")
    return source, out


def weight_files(folder: Path) -> WeightFiles:
    """Return the safetensors files that transformers would load from `folder`; raise a ValueError if there are none."""
    if (folder / SINGLE).is_file():
        names, index = (SINGLE,), None
    elif (folder / INDEX).is_file():
        index = _read_table(folder / INDEX)
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{folder / INDEX} has no weight_map: copy the folder again.")
        for name in weight_map.values():
            # Only plain file names are accepted, because an index must not lead out of its folder.
            if (
                not isinstance(name, str)
                or Path(name).name != name
                or not name.endswith(".safetensors")
                or len(name) > 200
            ):
                raise ValueError(f"{folder / INDEX} names {name!r}, which is no safetensors file of its folder.")
        names = tuple(sorted(set(weight_map.values())))
    else:
        raise ValueError(
            f"{folder} holds no {SINGLE} and no {INDEX}: give a transformers folder with safetensors, such as a run's "
            "model/."
        )
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}, which its index names: copy the folder again.")
        if not _is_own(folder / name, folder):
            raise ValueError(f"{folder / name} is a link that leads out of its folder: put the file in its place.")
    return WeightFiles(folder, names, index)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the contents of config.json in `folder`; raise a ValueError if there is none."""
    if not (folder / CONFIG).is_file() or not _is_own(folder / CONFIG, folder):
        raise ValueError(f"{folder} holds no {CONFIG}: give a transformers folder, such as a run's model/.")
    return _read_table(folder / CONFIG)


def _check_room(out: Path, num_bytes: int) -> None:
    check_room(out, num_bytes + ROOM_FOR_SMALL_FILES, "the result", "or give a folder on another disk")


def _converted(
    source: Path,
    out: Path,
    files: WeightFiles,
    config: dict[str, Any],
    convert: Callable[[Path, Path], list[Stored]],
    names: Callable[[Sequence[Stored]], list[str]],
    is_dense: bool = False,
) -> Folder:
    """Convert the weight files, write index and config, and copy the other files."""
    result = Folder(source, out, source_bytes=files.num_bytes)
    weight_map, total_size = {}, 0
    with folder_aside(out) as aside:
        for path in files.paths:
            stored = convert(path, aside / path.name)
            result.tensors += stored
            result.out_bytes += (aside / path.name).stat().st_size
            weight_map.update(dict.fromkeys(names(stored), path.name))
            total_size += sum(tensor.dense_bytes if is_dense else tensor.stored_bytes for tensor in stored)
        if files.index is not None:
            found = files.index.get("metadata")
            metadata = {**(found if isinstance(found, dict) else {}), "total_size": total_size}
            _write_table(aside / INDEX, {**files.index, "metadata": metadata, "weight_map": weight_map})
        if not is_dense:
            config["quantization_config"]["version"] = version_of(result.tensors)
        _write_table(aside / CONFIG, config)
        result.not_copied = _copy_others(source, aside, {*files.names, INDEX, CONFIG})
    return result


def _copy_others(source: Path, target: Path, done: set[str]) -> list[str]:
    """Copy tokenizer, card and other files; return those left out: weights, pickles, links that lead out of the folder."""
    left = []
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if str(name) in done or path.is_dir() or any(part.startswith(".") for part in name.parts):
            continue
        if not path.is_file() or not _is_own(path, source) or path.suffix.lower() in _WEIGHTS or _is_pickle(path):
            left.append(str(name))
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)
    return left


def _is_own(path: Path, folder: Path) -> bool:
    """Return whether a file is in `folder`, or in the blobs of the hub's cache if `folder` is a snapshot there."""
    place, homes = path.resolve(), [folder.resolve()]
    if homes[0].parent.name == "snapshots":
        homes.append(homes[0].parent.parent / "blobs")
    return any(place.is_relative_to(home) for home in homes)


def _is_pickle(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4).startswith(_PICKLE_STARTS)


def _check_index(files: WeightFiles, held: dict[str, list[str]]) -> None:
    """Raise a ValueError if index and files name different tensors, or two files hold the same one."""
    found: dict[str, str] = {}
    for file, names in held.items():
        for name in names:
            if found.setdefault(name, file) != file:
                raise ValueError(f"{files.folder} holds {name} in {found[name]} and in {file}: copy the folder again.")
    if files.index is not None and files.index["weight_map"] != found:
        wrong = min(set(files.index["weight_map"].items()) ^ set(found.items()))
        raise ValueError(f"{files.folder}: the index and {wrong[1]} disagree on {wrong[0]}: copy the folder again.")


def _stored_names(tensors: Sequence[Stored]) -> list[str]:
    return [name for tensor in tensors for name in tensor.parts]


def _quantization(config: dict[str, Any]) -> str:
    """Return the quantization method that the config names, or an empty text."""
    found = config.get("quantization_config")
    return "" if found is None else str(found.get("quant_method", "?") if isinstance(found, dict) else found)


def _checked_dtype(dtype: str | None) -> str | None:
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype={dtype} is not known: choose one of {', '.join(FLOATS)}.")
    return FLOATS[dtype] if dtype else None


def _read_table(path: Path) -> dict[str, Any]:
    try:
        table = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): copy it again.") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path} is not a table: copy it again.")
    return table


def _write_table(path: Path, table: dict[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
