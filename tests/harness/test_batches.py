"""Order, flips, shares and streaming."""
import subprocess
import sys

import pytest
import torch
from conftest import HERE
from test_datasets import open_folder, pictures

import datasets
from datasets import Source, load
from harness import batches
from harness.batches import Batches
from harness.images import ImageFiles


def test_epochs_differ_repeat_exactly_and_start_anywhere(tmp_path):
    pictures(tmp_path, 30)
    train = open_folder(tmp_path, flip=True).train
    whole = [x for x, _ in train.epoch(3)]
    assert torch.equal(torch.cat(whole), torch.cat([x for x, _ in train.epoch(3)]))
    assert torch.equal(torch.cat(whole[2:]), torch.cat([x for x, _ in train.epoch(3, start=2)]))
    assert not torch.equal(whole[0], next(train.epoch(4))[0])
    assert whole[0].is_contiguous(memory_format=torch.channels_last)


def broken_set(folder, count, broken, *args, **how):
    """Batches of so many images that stream, of which those of the numbers `broken` do not decode."""
    paths = pictures(folder, count)
    for number in broken:
        paths[number].write_bytes(b"broken")
    return Batches(ImageFiles(paths, (16, 16), 3, skip_broken=True), torch.arange(count), *args, **how)


@pytest.mark.parametrize("batch", [1, 2])
def test_other_images_stand_for_a_training_batch_whose_images_are_all_broken(tmp_path, batch):
    broken, after = {0, 1, 4, 5, 8}, [2, 2, 2, 3, 6, 6, 6, 7, 2]  # 8: on from the first
    train = broken_set(tmp_path, 9, broken, batch, shuffle=True, seed=2)
    seen, stood_in = [labels.tolist() for _, labels in train.epoch(0)], set()
    plan = [indices.tolist() for indices, *_ in train._plan(0)]
    assert len(seen) == len(train) == 9 // batch
    for indices, labels in zip(plan, seen):
        if broken.issuperset(indices):
            stood_in.add(labels[0])
            assert labels[0] == after[indices[0]] and len(labels) == batch and broken.isdisjoint(labels)
        else:
            assert labels == [number for number in indices if number not in broken]
    assert stood_in == {2, 6}
    for start in range(len(train)):
        assert [labels.tolist() for _, labels in train.epoch(0, start)] == seen[start:]


def test_a_process_whose_share_of_an_evaluated_batch_is_broken_goes_on_without_it(tmp_path):
    shares = []
    for rank in range(2):
        valid = broken_set(tmp_path / str(rank), 8, (2, 3, 6), 2)
        valid.shard(rank, 2)
        shares.append([labels.tolist() for _, labels in valid])
    assert shares == [[[0, 1], [4, 5]], [[7]]]
    valid = broken_set(tmp_path / "none", 8, (2, 3, 6, 7), 2)
    valid.shard(1, 2)
    with pytest.raises(ValueError, match="none of 4 images decodes, such as .*: repair or remove them"):
        list(valid)


def test_flips_mirror_about_half_of_the_images_left_to_right():
    pixels = torch.arange(4, dtype=torch.uint8).view(1, 1, 4, 1).expand(400, 1, 4, 1).contiguous()
    x = next(iter(Batches(pixels, torch.zeros(400), 400, flip=True)))[0]
    mirrored = (x[:, 0, 0, 0] > x[:, 0, 0, 3]).float().mean()
    assert 0.4 < mirrored < 0.6 and (x.sort(3).values[0] == x.sort(3).values).all()


def test_images_that_a_device_has_no_room_for_yield_the_same(tmp_path, monkeypatch):
    pictures(tmp_path, 30, (20, 24))
    source = Source(str(tmp_path), (8, 12), crop_scale=1.5)
    near, sent = load("folder", source, 4, flip=True), []
    expected, examples = list(near.train.epoch(1)), near.train.examples(5)
    monkeypatch.setattr(batches, "has_room", lambda device, images: False)
    monkeypatch.setattr(batches, "send", lambda tensor, device: sent.append(tensor) or tensor.clone())
    far = load("folder", source, 4, flip=True)
    pairs = list(zip(expected, far.train.epoch(1), strict=True))
    assert all(torch.equal(a, b) and torch.equal(la, lb) for (a, la), (b, lb) in pairs)
    assert sent[0].shape == (4, 12, 18, 3) and len(sent) == 2 * len(pairs)  # bytes of one batch at a time, uncropped
    assert torch.equal(examples, far.train.examples(5))


def test_a_set_is_kept_in_memory_where_it_is_no_larger_than_what_is_granted(tmp_path):
    pictures(tmp_path, 30)
    size = 30 * 8 * 8 * 3 / datasets.GB
    assert not load("folder", Source(str(tmp_path), memory=size), 4).train.streams
    assert load("folder", Source(str(tmp_path), memory=size * 0.99), 4).train.streams


@pytest.mark.parametrize("flip", [False, True])
def test_streaming_and_memory_yield_the_same(tmp_path, monkeypatch, flip):
    pictures(tmp_path, 30)
    memory = open_folder(tmp_path, flip=flip)
    monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 0)
    for workers in (0, 2):
        streamed = open_folder(tmp_path, flip=flip, workers=workers)
        assert isinstance(streamed.train.images, ImageFiles) and streamed.size == memory.size
        for start in (0, 3):
            pairs = list(zip(memory.train.epoch(1, start), streamed.train.epoch(1, start), strict=True))
            assert all(torch.equal(a, b) and torch.equal(la, lb) for (a, la), (b, lb) in pairs)


def test_workers_go_on_into_the_next_epoch(tmp_path, monkeypatch):
    pictures(tmp_path, 30)
    memory = open_folder(tmp_path, flip=True)
    monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 0)
    streamed, loaders = open_folder(tmp_path, flip=True, workers=1), []
    for epoch, start in ((0, 2), (1, 0), (2, 0), (2, 0)):  # resumed, two in turn, and one once more
        pairs = list(zip(memory.train.epoch(epoch, start), streamed.train.epoch(epoch, start), strict=True))
        assert all(torch.equal(a, b) for (a, _), (b, _) in pairs)
        loaders.append(streamed.train._ahead[1])
    assert loaders[0] is loaders[1] is loaders[2] and loaders[3] is not loaders[2]
    next(streamed.train.epoch(3))  # left early: nothing to go on with
    assert streamed.train._ahead is None


@pytest.mark.parametrize("count, batch", [(51, 8), (48, 8), (49, 8), (7, 8), (33, 16), (32, 16)])
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("train", [False, True])
def test_processes_share_the_images_of_every_batch(count, batch, world, train):
    images, labels = torch.zeros(count, 4, 4, 1, dtype=torch.uint8), torch.arange(count)
    shares = []
    for rank in range(world):
        batches = Batches(images, labels, batch, shuffle=train, flip=True)
        batches.shard(rank, world)
        shares.append([label for _, label in batches.epoch(3)])
        assert len(shares[-1]) == len(batches)
    alone = [label for _, label in Batches(images, labels, batch * world, shuffle=train, flip=True).epoch(3)]
    seen = [torch.cat(parts) for parts in zip(*shares)]
    assert torch.equal(torch.cat(seen), torch.cat(alone)) and all(len(label) for share in shares for label in share)
    assert torch.equal(seen[0], alone[0]) or len(alone) == 2  # the same batches, a tail too small for all aside


@pytest.mark.parametrize("count, lengths", [(51, [8] * 6), (48, [8] * 6), (8, [8]), (7, [7])])
def test_training_drops_the_ragged_tail_and_evaluation_keeps_it(count, lengths):
    images, labels = torch.zeros(count, 4, 4, 1, dtype=torch.uint8), torch.arange(count)
    train = Batches(images, labels, 8, shuffle=True)
    seen = [[label for _, label in train.epoch(epoch)] for epoch in range(40)]
    assert all(list(map(len, epoch)) == lengths == train.sizes() for epoch in seen)
    assert all(len(torch.cat(epoch).unique()) == sum(lengths) for epoch in seen)
    assert len(torch.cat([label for epoch in seen for label in epoch]).unique()) == count  # another tail each epoch
    assert torch.equal(torch.cat([label for _, label in Batches(images, labels, 8)]), labels)


def test_no_two_pairs_of_seed_and_epoch_share_an_order():
    images, labels = torch.zeros(50, 1, 1, 1, dtype=torch.uint8), torch.arange(50)
    orders = {tuple(next(Batches(images, labels, 50, shuffle=True, seed=seed).epoch(epoch))[1].tolist())
              for seed in (*range(8), 2 ** 61 - 1, 2 ** 61) for epoch in range(8)}
    assert len(orders) == 80


@pytest.mark.parametrize("images", [torch.zeros(4, 8, 8, 3), torch.zeros(4, 8, 8, dtype=torch.uint8)])
def test_images_in_memory_are_bytes_so_that_their_range_is_certain(images):
    with pytest.raises(ValueError, match="uint8"):
        Batches(images, torch.zeros(4), 2)


def test_fewer_images_than_processes_are_an_error():
    batches = Batches(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), torch.zeros(2), 2)
    with pytest.raises(ValueError, match="2 valid images are fewer than the 3 processes"):
        batches.shard(0, 3, "valid")


@pytest.mark.parametrize("world", [1, 2])
def test_crops_and_flips_are_the_same_streamed_shared_and_resumed(tmp_path, monkeypatch, world):
    pictures(tmp_path, 30, (20, 24))
    source = Source(str(tmp_path), (8, 12), crop_scale=1.5)
    alone = [x for x, _ in load("folder", source, 4 * world, flip=True).train.epoch(3)]
    monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 0)
    shares = []
    for rank in range(world):
        train = load("folder", source, 4, flip=True, workers=1).train
        train.shard(rank, world)
        shares.append([x for x, _ in train.epoch(3, start=2)])
    assert all(torch.equal(torch.cat(parts), x) for parts, x in zip(zip(*shares, strict=True), alone[2:], strict=True))


@pytest.mark.parametrize("when", ["starting", "started", "at work"])
def test_processes_that_decode_end_with_one_that_is_killed(when):
    """Else they would hold the pipes of a comparison, which waits for them."""
    code = f"""if True:
        import os, time
        import torch
        from torch.utils.data._utils import worker
        from harness import images

        def wait_for_the_end_of(parent, now):
            os.write(1, f"{{now}}\\n".encode())  # at once: several do
            while "{when}" == now and os.getppid() == parent:
                time.sleep(0.01)

        class Watchdog(worker.ManagerWatchdog):  # a worker's last step before its work
            def __init__(self, parent=os.getpid()):
                wait_for_the_end_of(parent, "started")
                super().__init__()

        torch.set_num_threads(2)
        torch.set_num_threads = lambda _, parent=os.getpid(): wait_for_the_end_of(parent, "starting")  # its first call
        worker.ManagerWatchdog = Watchdog
        images.MANY_FILES = 8
        images.decode = lambda path, *_: os.write(1, b"at work\\n") and torch.zeros(8, 8, 3).byte().numpy()
        images.ImageFiles([""] * 10 ** 6, (8, 8), 3).decode_all()"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=HERE, stdout=subprocess.PIPE, text=True)
    assert any(line == f"{when}\n" for line in process.stdout)
    process.kill()
    process.communicate(timeout=60)  # until every process has closed the pipe
