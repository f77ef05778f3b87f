"""Files and folders are complete or absent."""

import stat

import pytest

from sparsity.common.files import (
    aside,
    check_room,
    folder_aside,
    free_bytes,
    remove_folder,
    sha256_of,
    write_atomically,
)


def cut_off(written):
    """Write half of a file or folder, then fail."""
    with written as partial:
        (partial / "half" if partial.is_dir() else partial).write_text("new")
        raise RuntimeError("cut off")


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    with pytest.raises(RuntimeError, match="cut off"):
        cut_off(aside(path))
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_appears_whole_and_replaces_another(tmp_path):
    folder = tmp_path / "model"
    with folder_aside(folder) as partial:
        (partial / "a").write_text("1")
        assert not folder.exists()
    with pytest.raises(RuntimeError, match="cut off"):
        cut_off(folder_aside(folder))
    assert [file.name for file in folder.iterdir()] == ["a"]
    with folder_aside(folder) as partial:
        (partial / "b").write_text("2")
    assert [file.name for file in folder.iterdir()] == ["b"]
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    remove_folder(folder)
    assert list(tmp_path.iterdir()) == []


def test_the_umask_decides_who_may_read_a_file(tmp_path):
    with folder_aside(tmp_path / "run") as partial:
        write_atomically(partial / "a", "1")
    plain = tmp_path / "plain"
    plain.write_text("1")
    plain_mode, mode = (stat.S_IMODE(path.stat().st_mode) for path in (plain, tmp_path / "run" / "a"))
    assert mode == plain_mode


def test_what_does_not_fit_is_refused_with_both_sizes_and_the_remedy(tmp_path):
    check_room(tmp_path / "not" / "there", 1, "the run", "or wait")
    with pytest.raises(ValueError, match=r"GB free and the run needs 1000000\.00 GB: free some space, or wait\.$"):
        check_room(tmp_path / "not" / "there", 10**15, "the run", "or wait")
    assert free_bytes(tmp_path / "not" / "there") == pytest.approx(free_bytes(tmp_path), rel=0.1)


def test_the_sum_is_sha256s(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
