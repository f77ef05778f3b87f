"""Write the docstrings of packages that are not installed, as text for the claim's runs: `data=text data.path=FOLDER`.

    python -m tests.gpu.docstrings FOLDER [--packages tests/gpu/docstring_packages.txt]

pip downloads a wheel of each package, whose Python files are parsed but never run. FOLDER gets part-00000.jsonl.gz and so
on, with the same documents as data=pydocs makes, each body once. One GPU reads in minutes as much as two cores in hours, so
the docstrings of one environment are not enough for it.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from train.data.pydocs import find_sources, write_documents

PACKAGES = Path(__file__).with_name("docstring_packages.txt")
PYTHON_VERSION = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux_2_24_x86_64", "any")
DOWNLOADS_AT_A_TIME = 4


def read_packages(file: Path) -> list[str]:
    """Return the requirements in a file, one per line; `#` begins a comment."""
    lines = (line.split("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def python_files(wheel: Path, folder: Path) -> int:
    """Unpack the Python files of a wheel into a new folder, and return how many there are."""
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".py") and is_below(name)]
        archive.extractall(folder, members=names)
    return len(names)


def is_below(name: str) -> bool:
    """Return whether a name in an archive stays inside the folder into which it is unpacked."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def download(requirement: str, folder: Path) -> Path | None:
    """Download a package's wheel for any version of Python and Linux; return None if there is none."""
    folder.mkdir()
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version",
        PYTHON_VERSION, *platforms, "--dest", str(folder), requirement,
    ]  # fmt: skip
    subprocess.run(command, capture_output=True, check=False)
    return next(folder.glob("*.whl"), None)


def fetch(requirement: str, work: Path) -> Path | None:
    """Return a folder with the Python files of a package, or None if it cannot be downloaded."""
    name = requirement.partition("==")[0]
    wheel = download(requirement, work / f"{name}.wheel")
    if wheel is None:
        return None
    python_files(wheel, work / name)
    shutil.rmtree(wheel.parent)
    return work / name


def compress(folder: Path) -> int:
    """Replace the jsonl files of a folder by jsonl.gz, and return their bytes before compression."""
    num_bytes = 0
    for file in sorted(folder.glob("*.jsonl")):
        content = file.read_bytes()
        num_bytes += len(content)
        # Without a time stamp the same text gives the same file.
        file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(content, mtime=0))
        file.unlink()
    return num_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--packages", type=Path, default=PACKAGES)
    options = parser.parse_args()
    requirements = read_packages(options.packages)
    options.folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        with ThreadPoolExecutor(DOWNLOADS_AT_A_TIME) as pool:
            fetched = list(tqdm(pool.map(lambda name: fetch(name, work), requirements), total=len(requirements)))
        missing = [name for name, folder in zip(requirements, fetched, strict=True) if folder is None]
        write_documents(find_sources([folder for folder in fetched if folder]), options.folder)
    num_bytes = compress(options.folder)
    print(f"{num_bytes / 1e6:.1f} MB of documents of {len(requirements) - len(missing)} packages in {options.folder}")
    if missing:
        sys.exit(f"error: no wheel of {', '.join(missing)}: leave them out of {options.packages}.")


if __name__ == "__main__":
    main()
