"""The checkpoint's format: any rows of it can be read, damage is found, and a failed write leaves nothing."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsity.callback import SparsityCallback
from sparsity.common.files import sha256_of
from sparsity.mask import pack_mask, unpack_mask
from sparsity.schedule import Geometric
from sparsity.shards import ParameterShard
from tests.distributed import run_ranks
from train.checkpoints import layout
from train.checkpoints.contents import Pieces
from train.checkpoints.read import CheckpointReader, load_masks
from train.checkpoints.tensorfile import file_bytes, write_tensors
from train.checkpoints.write import Checkpoint, write_checkpoint
from train.distributed import World
from train.faults.stop import RunStopped

ALONE = World(0, 1, torch.device("cpu"))
WEIGHT = torch.arange(21, dtype=torch.float32).view(7, 3)
MASK = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 0]], dtype=torch.bool)


def save(root: Path, step: int, size: int = 7, world: World = ALONE) -> Path:
    """Write a checkpoint of WEIGHT and MASK in pieces of `size` rows, one for each rank."""
    pieces = Pieces(list(range(world.size)), {"w": size})
    start, stop = pieces.of("w", world.rank, len(WEIGHT)) or (0, 0)
    tensors = {"model/w": WEIGHT[start:stop], "mask/w": pack_mask(MASK[start:stop].reshape(-1))}
    state = {"shapes": {"w": [7, 3]}}
    return write_checkpoint(Checkpoint(root, step, world, tensors, pieces, state, write_trainer_state))


def write_trainer_state(path: str) -> None:
    Path(path).write_text("{}")


def world_here() -> World:
    import torch.distributed as dist

    return World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


@pytest.mark.parametrize("num_weights", [0, 1, 7, 8, 9, 64, 1001])
def test_a_mask_of_bits_comes_back_from_any_byte(num_weights):
    mask = torch.rand(num_weights, generator=torch.Generator().manual_seed(num_weights)) < 0.5
    bits = pack_mask(mask)
    assert bits.dtype == torch.uint8
    assert len(bits) == -(-num_weights // 8)
    for start in range(0, num_weights, 5):
        assert unpack_mask(bits[start // 8 :], start, num_weights).equal(mask[start:])


def test_safetensors_reads_what_is_written_here(tmp_path):
    tensors = {
        "a": torch.randn(3, 4),
        "b": torch.randn(5).bfloat16(),
        "empty": torch.zeros(0, 7),
        "number": torch.tensor(3.5, dtype=torch.float64),
        "strided": torch.randn(4, 6).t(),
        "bits": torch.arange(9, dtype=torch.uint8),
    }
    path = tmp_path / "file.safetensors"
    digest = write_tensors(path, tensors)
    assert digest == sha256_of(path)
    assert path.stat().st_size == file_bytes(tensors)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(found[name].equal(tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)


def test_three_ranks_files_are_read_in_every_cut_of_rows(tmp_path):
    run_ranks(save_on_three_ranks, 3, tmp_path)
    folder = layout.folder_of(tmp_path, 5)
    assert layout.damage(folder) is None
    reader = CheckpointReader(folder)
    for start in range(8):
        for stop in range(start, 8):
            rows = reader.rows("model", "w", start, stop)
            assert (rows is None) if start == stop else rows.equal(WEIGHT[start:stop])
            found = reader.mask("w", 3 * start, 3 * stop, per_row=3)
            assert found.equal(MASK[start:stop].reshape(-1))


def save_on_three_ranks(root: Path) -> None:
    save(root, 5, size=4, world=world_here())


def test_every_flipped_byte_and_every_truncation_is_noticed(tmp_path):
    folder = save(tmp_path, 5)
    assert layout.damage(folder) is None
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for position in {0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 1}:
            data = bytearray(whole)
            data[position] ^= 0x10
            path.write_bytes(data)
            assert layout.damage(folder), (path.name, position)
            path.write_bytes(whole[:position])
            assert layout.damage(folder), (path.name, "cut", position)
        path.unlink()
        assert layout.damage(folder) == f"{path.name} is missing"
        path.write_bytes(whole)
    assert layout.damage(folder) is None


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_chosen(tmp_path):
    for step in (5, 10, 15):
        save(tmp_path, step)
    (layout.folder_of(tmp_path, 15) / layout.STATE).write_text("{}")
    chosen, warnings = layout.newest_whole(tmp_path, ALONE)
    assert chosen == layout.folder_of(tmp_path, 10)
    assert len(warnings) == 1
    assert "checkpoint-15 is damaged (state.json does not have the checksum" in warnings[0]
    assert (tmp_path / "checkpoint-15.damaged").is_dir()


def test_no_whole_checkpoint_left_is_an_error_that_names_overwrite(tmp_path):
    (save(tmp_path, 5) / layout.rank_file(0)).unlink()
    with pytest.raises(RunStopped, match=r"rank-00000.safetensors is missing.*overwrite=true"):
        layout.newest_whole(tmp_path, ALONE)


@pytest.mark.parametrize(("keep", "left"), [(1, [20]), (2, [20, 15]), (9, [20, 15, 10, 5])])
def test_the_newest_checkpoints_are_kept(tmp_path, keep, left):
    for step in (5, 10, 15, 20):
        save(tmp_path, step)
    layout.remove_old(tmp_path, keep, newest=20)
    assert [layout.step_of(folder) for folder in layout.checkpoints(tmp_path)] == left


def test_a_rank_without_room_ends_all_and_the_checkpoint_before_stays(tmp_path):
    sentences = run_ranks(fail_on_the_second_rank, 2, tmp_path)
    assert sentences[0] == sentences[1]
    assert "checkpoint-10 could not be saved, it takes" in sentences[0]
    assert "File too large" in sentences[0]
    assert "checkpoint-5 is complete" in sentences[0]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    assert layout.damage(layout.folder_of(tmp_path, 5)) is None


def fail_on_the_second_rank(root: Path) -> str:
    world = world_here()
    save(root, 5, size=4, world=world)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        save(root, 10, size=4, world=world)
    except RunStopped as stopped:
        return str(stopped)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    raise AssertionError("a file that does not fit was written")


def test_a_checkpoint_without_masks_is_refused(tmp_path):
    tensors = {"model/w": WEIGHT}
    folder = write_checkpoint(Checkpoint(tmp_path, 5, ALONE, tensors, Pieces([0], {"w": 7}), {}, write_trainer_state))
    shard = ParameterShard("w", WEIGHT.clone().view(-1), torch.ones(21, dtype=torch.bool), 0, 21)
    with pytest.raises(ValueError, match="has no mask of w: resuming from it would train a dense model"):
        load_masks(CheckpointReader(folder), [shard], lambda name: 3)


def pruned_callback() -> tuple[torch.nn.Linear, SparsityCallback]:
    """Return a layer of 64 weights, half of them pruned in one event at step 0, and its callback."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 8, bias=False)
    callback = SparsityCallback(Geometric(0.5, 0, 0, 1), include=["weight"])
    callback.bind(layer)
    callback.pruner.prune(0.5)
    return layer, callback


def test_masks_that_agree_are_taken_over():
    _, callback = pruned_callback()
    callback.load_state(callback.state(), global_step=1)
    assert callback.density == 0.5


def test_masks_with_other_counts_than_the_checkpoint_are_refused():
    _, callback = pruned_callback()
    state = {**callback.state(), "kept": {"weight": 31}}
    with pytest.raises(ValueError, match="keeps 32 weights, but the checkpoint counted 31"):
        callback.load_state(state, global_step=1)


def test_a_pruned_weight_that_is_not_zero_is_refused():
    layer, callback = pruned_callback()
    with torch.no_grad():
        layer.weight.view(-1)[int((~callback.shards[0].mask).nonzero()[0])] = 1e-30
    with pytest.raises(ValueError, match="1 weights that its masks prune but that are not 0"):
        callback.load_state(callback.state(), global_step=1)


def test_more_or_fewer_pruned_weights_than_scheduled_are_refused():
    _, callback = pruned_callback()
    with pytest.raises(ValueError, match="32 pruned weights, but the schedule prunes 0 before step 0"):
        callback.load_state(callback.state(), global_step=0)
