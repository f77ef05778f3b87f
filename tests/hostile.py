"""Damage compact folders at random. Reading one must give the same tensors or a ValueError, in bounded memory.

python -m tests.hostile [--count 20000] [--first 0]
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import trange

from sparsity.compact import METHOD, compact_folder, expand_folder
from sparsity.compact.rounding import Rounding

INDEX = "model.safetensors.index.json"
ROOM = 64 << 20
"""The bytes of address space that reading may use in addition to those of the process."""


def write_plain(folder: Path) -> None:
    """Write a folder of two small shards with sparse, dense, empty and odd-sized tensors of several types."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "a": (40, 33),
        "b": (64, 64),
        "c": (7, 11, 5),
        "norm": (64,),
        "scalar": (),
        "empty": (0, 4),
        "zero": (32, 32),
    }
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in ("a", "b", "c", "zero"):
        tensors[name][torch.rand(shapes[name], generator=generator) < 0.8] = 0
    tensors["zero"].zero_()
    tensors["b"] = tensors["b"].bfloat16()
    tensors["positions"] = torch.arange(300)
    shards = {"model-00001-of-00002.safetensors": ("a", "norm", "scalar", "b"), "model-00002-of-00002.safetensors": ("c", "empty", "zero", "positions")}  # fmt: skip # noqa: E501
    folder.mkdir(parents=True)
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, names in shards.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def all_tensors(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Return the type, shape and bytes of every tensor of a plain folder."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            bits = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
            found[name] = (str(tensor.dtype), list(tensor.shape), bits)
    return found


# --- ways to damage a folder ---


def split_file(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join_file(path: Path, header: Any, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def change_bytes(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    place, size = rng.randrange(len(data)), rng.choice((1, 1, 2, 8, 200))
    match rng.randrange(6):
        case 0:
            data[place] ^= 1 << rng.randrange(8)
        case 1:
            del data[place:]
        case 2:
            data[place : place + size] = rng.randbytes(size)
        case 3:
            data[place:place] = rng.randbytes(size)
        case 4:
            data[place : place + size] = bytes(len(data[place : place + size]))
        case _:
            del data[place : place + size]
    path.write_bytes(data)


NUMBERS = (
    -1,
    0,
    1,
    2,
    7,
    8,
    64,
    2**31,
    2**32,
    2**53,
    2**60,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    1.5,
    True,
    None,
    "8",
    [],
    1e400,
)


def change_number(value: Any, rng: random.Random) -> Any:
    return rng.choice((*NUMBERS, value + rng.choice((-8, -1, 1, 8)) if isinstance(value, int) else 3))


def change_header(path: Path, rng: random.Random) -> None:
    header, data = split_file(path)
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.choice(names), rng.choice(names)
    entry = header[name]
    match rng.randrange(10):
        case 0:
            path.write_bytes(
                rng.choice((2**60, 2**64 - 1, 10**8, len(data), 0)).to_bytes(8, "little") + path.read_bytes()[8:]
            )
            return
        case 1:
            entry["dtype"] = rng.choice(("F32", "BF16", "F16", "U8", "BOOL", "F64", "F4", "X", "", None, 4, []))
        case 2:
            entry["shape"] = rng.choice(
                ([], [2**62, 4], [2**31, 2**31, 2**31], [1] * 100, [-1], None, [change_number(8, rng)])
            )
        case 3:
            place = rng.randrange(2)
            entry["data_offsets"][place] = change_number(entry["data_offsets"][place], rng)
        case 4:
            header[name], header[other] = header[other], header[name]
        case 5:
            del header[name]
        case 6:
            header[rng.choice(("", "x", other, name + ".bitmask", "../x", "\ud800"))] = header.pop(name)
        case 7:
            entry["data_offsets"] = list(header[other]["data_offsets"])
        case 8:
            header[name] = rng.choice((None, [], {}, 3, "x", {**entry, "more": 1}))
        case _:
            header["__metadata__"] = change_contents(header["__metadata__"], rng)
    join_file(path, header, data)


def change_contents(metadata: Any, rng: random.Random) -> Any:
    table = json.loads(metadata[METHOD])
    name, other = rng.choice(list(table["tensors"])), rng.choice(list(table["tensors"]))
    entry = table["tensors"][name]
    match rng.randrange(10):
        case 0:
            return rng.choice((None, [], {}, {METHOD: ""}, {METHOD: "[" * 100_000}, {METHOD: "{}"}, {METHOD: 3}))
        case 1:
            table["version"] = rng.choice((0, 2, "1", 1.0, True, None))
        case 2:
            del table["tensors"][name]
        case 3:
            table["tensors"][rng.choice(("x", other, ""))] = table["tensors"].pop(name)
        case 4:
            entry["crc32"] = rng.choice(("00000000", "x", 3, None, table["tensors"][other]["crc32"]))
        case 5:
            entry["shape"] = rng.choice(
                ([2**62], [2**31, 2**31], [0], [], None, [40 * 33], [33, 40], [64], [1, 32, 32])
            )
        case 6:
            shape = entry.get("shape", [1])
            place = rng.randrange(len(shape))
            entry["shape"] = [change_number(size, rng) if at == place else size for at, size in enumerate(shape)]
        case 7:
            table["tensors"] = rng.choice((None, [], {}, 3))
        case 8:
            field = rng.choice(("kept", "row_starts"))
            entry[field] = rng.choice((True, False, change_number(entry.get(field, 8), rng)))
        case _:
            table["tensors"][name], table["tensors"][other] = table["tensors"][other], entry
    return {**metadata, METHOD: json.dumps(table)}


def swap_data(path: Path, rng: random.Random) -> None:
    """Swap the bytes of two tensors under a valid header."""
    header, data = split_file(path)
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    first, second = rng.sample(entries, 2)
    first["data_offsets"], second["data_offsets"] = second["data_offsets"], first["data_offsets"]
    join_file(path, header, data)


def change_index(path: Path, rng: random.Random) -> None:
    index = json.loads(path.read_text())
    name = rng.choice(list(index["weight_map"]))
    match rng.randrange(4):
        case 0:
            del index["weight_map"][name]
        case 1:
            index["weight_map"][name] = rng.choice(
                ("../x.safetensors", "/etc/passwd", "/dev/zero.safetensors", "", ".", "x" * 5000 + ".safetensors", None, 3, [],
                 "a\0.safetensors", "config.json", *set(index["weight_map"].values()))
            )  # fmt: skip
        case 2:
            gone = index["weight_map"][name]
            index["weight_map"] = {key: file for key, file in index["weight_map"].items() if file != gone}
        case _:
            index["weight_map"] = rng.choice(
                (None, [], {}, 3, {"x": "x"}, {**index["weight_map"], "x": "y.safetensors"})
            )
    path.write_text(json.dumps(index))


def damage(folder: Path, rng: random.Random) -> None:
    """Change one file of `folder` in some way."""
    weights = sorted(folder.glob("*.safetensors"))
    changes: list[tuple[Callable[[Path, random.Random], None], Path]] = [
        *[(change, rng.choice(weights)) for change in (change_bytes, change_header, change_header, swap_data)],
        (change_index, folder / INDEX),
        (change_bytes, folder / rng.choice((INDEX, "config.json"))),
        (lambda path, rng: path.unlink(), rng.choice((*weights, folder / INDEX))),
    ]
    change, path = rng.choice(changes)
    change(path, rng)


# --- the test ---


def attempt(whole: Path, place: Path, seed: int, expected: Any) -> str:
    """Damage a copy of `whole` and expand it; return "same" or "refused", and raise in any other case."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(whole, place / "compact")
    damage(place / "compact", random.Random(seed))
    try:
        expand_folder(place / "compact", place / "plain")
    except ValueError:
        if sorted(path.name for path in place.iterdir()) != ["compact"]:
            raise RuntimeError(f"seed {seed} left files behind") from None
        return "refused"
    assert all_tensors(place / "plain") == expected, f"seed {seed} gives other tensors"
    return "same"


def fuzz(count: int, first: int = 0, show_progress: bool = False) -> dict[str, int]:
    """Damage a folder `count` times, with `ROOM` more bytes of address space; count the outcomes."""
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        write_plain(base / "source")
        kinds: tuple[dict[str, Any], ...] = (
            {},
            {"rounding": Rounding(4, 32), "row_starts": True},
            {"rounding": Rounding(8)},
        )
        expected = []
        for number, options in enumerate(kinds):
            compact_folder(base / "source", base / f"whole-{number}", **options)
            expand_folder(base / f"whole-{number}", base / f"plain-{number}")
            expected.append(all_tensors(base / f"plain-{number}"))
        assert expected[0] == all_tensors(base / "source")
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, hard))
        for seed in trange(first, first + count, disable=not show_progress):
            number = seed % len(kinds)
            found[attempt(base / f"whole-{number}", base / "damaged", seed, expected[number])] += 1
    return dict(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    print(fuzz(arguments.count, arguments.first, show_progress=True))
