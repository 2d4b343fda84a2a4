"""Splits, orders, decoding, and what is said of bad input."""
import csv
import os
from functools import partial

import numpy as np
import pytest
import torch
from conftest import call, write_images
from PIL import Image

import datasets
from datasets import Source, load
from harness import checkpoint
from readers import boxing


def pictures(folder, count, size=(8, 8), mode="RGB", seed=0, suffix=".png"):
    """Write distinct random images; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for i in range(count):
        shape = size if mode == "L" else (*size, len(mode))
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8), mode).save(folder / f"{i:03d}{suffix}")
    return sorted(folder.iterdir())


def rows(batches):
    """The images of a split as a set of bytes."""
    return {bytes(((image + 1) * 127.5).round().byte().numpy().tobytes()) for x, _ in batches for image in x}


def open_folder(path, batch_size=4, **options):
    source = Source(str(path), **{k: options.pop(k) for k in ("image_size", "skip_broken", "limit") if k in options})
    return load("folder", source, batch_size, **options)


def test_folder_without_splits_is_carved_into_disjoint_ones(tmp_path):
    pictures(tmp_path, 30)
    data = open_folder(tmp_path)
    splits = [rows(batches) for batches in (data.train, data.valid, data.test)]
    assert [len(split) for split in splits] == [24, 3, 3]
    assert len(set.union(*splits)) == 30
    assert data.classes == [] and data.size == (8, 8) and data.channels == 3


def test_splits_do_not_depend_on_the_seed_but_the_order_does(tmp_path):
    pictures(tmp_path, 30)
    one, two = open_folder(tmp_path, seed=1), open_folder(tmp_path, seed=2)
    assert rows(one.valid) == rows(two.valid) and rows(one.train) == rows(two.train)
    assert not torch.equal(next(iter(one.train))[0], next(iter(two.train))[0])


def test_class_indices_are_those_of_sorted_names_over_all_splits(tmp_path):
    for i, path in enumerate(("train/zebra", "train/ant", "train/cat", "val/cat", "test/bee", "test/zebra")):
        pictures(tmp_path / path, 4, seed=i)
    data = open_folder(tmp_path, batch_size=100)
    assert data.classes == ["ant", "bee", "cat", "zebra"]
    labels = {split: set(next(iter(batches))[1].tolist())
              for split, batches in (("train", data.train), ("valid", data.valid), ("test", data.test))}
    assert labels == {"train": {0, 2, 3}, "valid": {2}, "test": {1, 3}}


def test_a_broken_image_is_named_or_skipped_and_counted(tmp_path, monkeypatch, capsys):
    paths = pictures(tmp_path, 30)
    paths[4].write_bytes(paths[4].read_bytes()[:40])
    with pytest.raises(ValueError, match=f"{paths[4].name} does not decode"):
        open_folder(tmp_path)
    data = open_folder(tmp_path, skip_broken=True)
    assert len(data.train.labels) + len(data.valid.labels) + len(data.test.labels) == 29
    assert "skipped 1 broken images of 30" in capsys.readouterr().out
    monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 0)
    data = open_folder(tmp_path, skip_broken=True)
    for _ in range(2):
        assert sum(len(x) for split in (data.train, data.valid, data.test) for x, _ in split) == 29
    assert capsys.readouterr().out.count("skipped 1 broken images") == 1


def test_sizes_that_differ_need_an_image_size(tmp_path):
    pictures(tmp_path / "a", 10, (8, 8))
    pictures(tmp_path / "b", 10, (12, 8))
    with pytest.raises(ValueError, match="--image-size"):
        open_folder(tmp_path)
    data = open_folder(tmp_path, image_size=(8, 12))
    assert next(iter(data.train))[0].shape[1:] == (3, 8, 12)


def test_greyscale_folders_have_one_channel_and_mixed_ones_three(tmp_path):
    pictures(tmp_path / "grey", 12, mode="L")
    assert open_folder(tmp_path / "grey").channels == 1
    pictures(tmp_path / "colour", 12)
    assert open_folder(tmp_path).channels == 3


def miniimagenet(folder):
    pictures(folder / "images", 12, (20, 30), suffix=".jpg")
    for split, start, names in (("train", 0, "dog cat"), ("val", 2, "ant"), ("test", 3, "eel")):
        with open(folder / f"{split}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["filename", "label"])
            writer.writerows((f"{i:03d}.jpg", name) for i, name in enumerate(names.split(), start))


def test_miniimagenet(tmp_path):
    miniimagenet(tmp_path)
    data = load("miniimagenet", Source(str(tmp_path), (16, 16)), 4)
    assert data.classes == ["ant", "cat", "dog", "eel"] and data.size == (16, 16)
    assert sorted(data.train.labels.tolist()) == [1, 2] and data.test.labels.tolist() == [3]
    (tmp_path / "images" / "000.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="000.jpg"):
        load("miniimagenet", Source(str(tmp_path), (16, 16)), 4)
    (tmp_path / "val.csv").unlink()
    with pytest.raises(FileNotFoundError, match="val.csv"):
        load("miniimagenet", Source(str(tmp_path)), 4)


def mnist(folder):
    """Write MNIST of 40 and 10 images as torchvision keeps it."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 40), ("t10k", 10)):
        images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count) % 10
        header = (2051).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in images.shape)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(
            (2049).to_bytes(4, "big") + count.to_bytes(4, "big") + labels.astype(np.uint8).tobytes())


def test_torchvision_sets_load_from_disk_and_no_download_refuses(tmp_path):
    mnist(tmp_path)
    data = load("mnist", Source(str(tmp_path), download=False), 8)
    assert (data.channels, data.size, len(data.classes)) == (1, (28, 28), 10)
    assert len(data.train.labels) == 36 and len(data.test.labels) == 10
    assert load("mnist", Source(str(tmp_path), (32, 32)), 8).train.images.shape[1:] == (32, 32, 1)
    for name in ("cifar10", "fashion-mnist"):
        with pytest.raises(FileNotFoundError, match="--no-download"):
            load(name, Source(str(tmp_path), download=False), 8)


def test_limit_keeps_the_first_training_images_and_some_of_every_part_of_the_others(tmp_path):
    for seed, (split, count) in enumerate((("train", 30), ("valid", 9), ("test", 3))):
        pictures(tmp_path / split, count, seed=seed)
    data, whole = open_folder(tmp_path, limit=5), open_folder(tmp_path)
    assert torch.equal(data.train.images, whole.train.images[:5])
    assert torch.equal(data.valid.images, whole.valid.images[::2])
    assert torch.equal(data.test.images, whole.test.images)
    assert data.carved == whole.carved


def test_limit_renders_no_more_of_boxing_and_keeps_nothing(tmp_path):
    pytest.importorskip("ale_py")
    data = load("boxing", Source(str(tmp_path), limit=7, in_order=True), 4)
    assert [len(split.labels) for split in (data.train, data.valid, data.test)] == [7, 7, 7]
    assert data.valid.labels[:, 2].tolist() == list(range(7)) and not list(tmp_path.iterdir())


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no images under"):
        open_folder(tmp_path)
    pictures(tmp_path, 2)
    with pytest.raises(ValueError, match="too few"):
        open_folder(tmp_path)


def test_boxing_is_rendered_once_and_read_from_its_cache(tmp_path, monkeypatch):
    pytest.importorskip("ale_py")
    monkeypatch.setattr(boxing, "FRAMES", {"train": 20, "valid": 5, "test": 5})
    data = load("boxing", Source(str(tmp_path)), 4)
    assert data.size == (84, 84) and data.train.images.float().std() > 10
    monkeypatch.setattr(boxing, "render", None)
    assert torch.equal(load("boxing", Source(str(tmp_path)), 4).train.images, data.train.images)
    (tmp_path / "boxing-84.npz").write_bytes(b"broken")
    with pytest.raises(ValueError, match="delete it"):
        load("boxing", Source(str(tmp_path)), 4)


def test_boxing_in_order_has_the_same_frames_and_what_led_to_them(tmp_path, monkeypatch):
    pytest.importorskip("ale_py")
    monkeypatch.setattr(boxing, "FRAMES", {"train": 1000, "valid": 5, "test": 5})
    train = load("boxing", Source(str(tmp_path), in_order=True), 4).train
    assert train.labels.shape == (1000, 4) and torch.equal(train.labels[:, 2], torch.arange(1000))
    action = train.labels[1:, 3]
    assert train.labels[0, 3] == 0 and action.max() < len(boxing.ACTIONS)
    held = torch.diff((action[1:] != action[:-1]).nonzero().squeeze(1))  # two equal draws in a row look like one
    assert len(held) > 5 and held.min() >= boxing.HELD[0] and held.max() > 2 * held.median()
    again = load("boxing", Source(str(tmp_path)), 4).train
    assert again.labels.ndim == 1 and again.images.sum() == train.images.sum()
    frames, clips = boxing.render(1000, seed=0, split="train")  # the same whoever plays
    assert np.array_equal(frames, train.images) and np.array_equal(clips, train.labels[:, 1:])


def test_an_older_cache_of_boxing_is_rendered_anew(tmp_path, monkeypatch):
    pytest.importorskip("ale_py")
    monkeypatch.setattr(boxing, "FRAMES", {"train": 9, "valid": 5, "test": 5})
    old = {split: np.zeros((3, 84, 84, 3), np.uint8) for split in boxing.FRAMES}
    np.savez_compressed(tmp_path / boxing.MARK, **old)
    assert len(load("boxing", Source(str(tmp_path)), 4).train.labels) == 9
    assert int(np.load(tmp_path / boxing.MARK)["version"]) == boxing.VERSION


def test_latents_of_an_older_boxing_are_told_from_those_of_today(tmp_path, monkeypatch):
    key, digests = partial(datasets.fingerprint, "boxing", Source(str(tmp_path))), []
    for name in (boxing.MARK, "another-set"):  # which lies next to it
        (tmp_path / name).write_bytes(b"frames")
        digests.append(key())
    monkeypatch.setattr(datasets.DATASETS["boxing"], "version", boxing.VERSION + 1)
    assert digests[0] == digests[1] != key()


def numbered(folder, clips, frames=3):
    for clip in range(clips):
        (folder / f"clip{clip}").mkdir(parents=True)
        for number in range(frames):
            name = f"{number + 8}.png"  # 8, 9, 10: in the order of numbers, not of names
            Image.fromarray(np.full((8, 8, 3), 20 * clip + number, np.uint8)).save(folder / f"clip{clip}" / name)


def test_a_folder_of_numbered_frames_in_order_keeps_whole_clips_together(tmp_path):
    numbered(tmp_path, 5)
    data = load("folder", Source(str(tmp_path), in_order=True), 4)
    clips = [set(split.labels[:, 1].tolist()) for split in (data.train, data.valid, data.test)]
    assert [len(part) for part in clips] == [3, 1, 1] and len(set.union(*clips)) == 5
    assert data.train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 20, 21, 22, 40, 41, 42]
    assert data.train.labels[:, 2].tolist() == [8, 9, 10] * 3


def test_what_has_no_sequences_says_so(tmp_path):
    with pytest.raises(ValueError, match="photos has no sequences"):
        load("photos", Source(image_size=(16, 16), in_order=True), 4)
    numbered(tmp_path, 2)
    with pytest.raises(ValueError, match="too few to carve"):
        load("folder", Source(str(tmp_path), in_order=True), 4)
    (tmp_path / "clip0" / "8.png").rename(tmp_path / "clip0" / "first.png")
    with pytest.raises(ValueError, match="has no number"):
        load("folder", Source(str(tmp_path), in_order=True), 4)


def test_boxing_names_the_package_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ale_py", None)
    with pytest.raises(ValueError, match="pip install ale-py"):
        load("boxing", Source(str(tmp_path)), 4)


# --- what a folder holds

def test_the_data_set_is_what_the_folder_holds(tmp_path):
    mnist(tmp_path / "a")
    miniimagenet(tmp_path / "b")
    pictures(tmp_path / "c" / "cat", 4)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "boxing-84.npz").touch()
    (tmp_path / "e" / "cifar-10-batches-py").mkdir(parents=True)
    (tmp_path / "f" / "FashionMNIST" / "raw").mkdir(parents=True)
    names = [datasets.detect(tmp_path / name) for name in "abcdef"]
    assert names == ["mnist", "miniimagenet", "folder", "boxing", "cifar10", "fashion-mnist"]
    pictures(tmp_path / "b" / "Train", 4)
    with pytest.raises(ValueError, match="holds miniimagenet and folder: say which with --dataset"):
        datasets.detect(tmp_path / "b")


@pytest.mark.parametrize("names", [("train", "valid", "test"), ("Train", "Val", "Test"), ("training", "val", "testing"),
                                   ("TRAIN", "Validation", "TEST")])
def test_splits_are_folders_of_any_case(tmp_path, names):
    for i, (name, count) in enumerate(zip(names, (12, 3, 4))):
        pictures(tmp_path / name / "cat", count, seed=i)
    data = open_folder(tmp_path)
    assert [len(split.labels) for split in (data.train, data.valid, data.test)] == [12, 3, 4]
    assert data.classes == ["cat"]
    assert str(data) == "data: folder, images: 12 train, 3 valid, 4 test, size: 8x8, channels: 3, classes: 1"


def test_what_is_hidden_or_beside_the_splits_is_left_out(tmp_path, capsys):
    for i, (name, count) in enumerate((("train/cat", 12), ("train/.thumbs", 3), ("test/cat", 4), (".git", 2))):
        pictures(tmp_path / name, count, seed=i)
    data = open_folder(tmp_path)
    assert data.classes == ["cat"] and len(data.train.labels) + len(data.valid.labels) == 12
    assert "left out" not in capsys.readouterr().out
    pictures(tmp_path / "car", 2)
    open_folder(tmp_path)
    assert f"left out what lies next to the folders of splits, such as {tmp_path / 'car'}" in capsys.readouterr().out


def test_a_fingerprint_follows_the_files_and_stops_at_loops(tmp_path):
    paths = pictures(tmp_path / "a", 3)
    source = Source(str(tmp_path))
    before = datasets.fingerprint("folder", source)
    (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert datasets.fingerprint("folder", source) == before
    os.utime(paths[0], (1, 1))
    assert datasets.fingerprint("folder", source) != before
    mnist(tmp_path)
    before = datasets.fingerprint("mnist", source)
    pictures(tmp_path / "b", 1)  # another data set next to it
    assert datasets.fingerprint("mnist", source) == before
    os.utime(next((tmp_path / "MNIST" / "raw").iterdir()), (1, 1))
    assert datasets.fingerprint("mnist", source) != before


def test_a_model_of_three_channels_takes_grey_images(tmp_path):
    pictures(tmp_path / "grey", 12, mode="L")
    pictures(tmp_path / "colour", 12)
    grey, forced = (load("folder", Source(str(tmp_path / "grey"), channels=channels), 4) for channels in (None, 3))
    assert (grey.channels, forced.channels) == (1, 3)
    assert torch.equal(forced.train.images, grey.train.images.expand(-1, -1, -1, 3))
    with pytest.raises(ValueError, match="colour"):
        load("folder", Source(str(tmp_path / "colour"), channels=1), 4)
    mnist(tmp_path)
    with pytest.raises(ValueError, match="has 1 channels, the model 3"):
        load("mnist", Source(str(tmp_path), channels=3), 4)


def test_a_checkpoint_of_an_unknown_data_set_and_of_one_without_folder():
    facts = {"args": {"data_folder": "data", "skip_broken": False},
             "data": {"name": "photos", "size": [8, 8], "channels": 3, "carved": ""}}
    with pytest.raises(ValueError, match="reads no folder"):
        Source.of(facts, "images")
    del facts["args"]["data_folder"]  # as in a best.pt alone
    assert Source.of(facts).folder == "data"
    with pytest.raises(ValueError, match="'sunsets' is not known"):
        load("sunsets", Source.of(facts), 4)


def test_lists_with_a_byte_order_mark(tmp_path):
    miniimagenet(tmp_path)
    path = tmp_path / "train.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"dog", "Hündin".encode()))
    assert "Hündin" in load("miniimagenet", Source(str(tmp_path), (16, 16)), 4).classes


def test_what_torchvision_says_is_folded_into_one_line(tmp_path, monkeypatch):
    from torchvision import datasets as tv

    class Offline(tv.CIFAR10):
        def download(self):
            raise RuntimeError("Error downloading x.tar.gz:\nTried https://a, got:\n<urlopen error>\n)")
    monkeypatch.setattr(tv, "CIFAR10", Offline)
    with pytest.raises(OSError, match="cannot be downloaded") as caught:
        load("cifar10", Source(str(tmp_path)), 4)
    assert "\n" not in str(caught.value) and "Tried https://a, got: <urlopen error>" in str(caught.value)


# --- random crops

@pytest.mark.parametrize("stream", [False, True])
def test_random_crops_are_parts_of_the_larger_image_and_differ_by_epoch(tmp_path, monkeypatch, stream):
    pictures(tmp_path, 30, (24, 24))
    if stream:
        monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 0)
    source = Source(str(tmp_path), (16, 16), crop_scale=1.5)
    data, whole = load("folder", source, 24), load("folder", Source(str(tmp_path)), 24)
    plain = load("folder", Source(str(tmp_path), (16, 16)), 24)
    assert data.size == (16, 16)
    assert rows(data.valid) == rows(plain.valid) and rows(data.test) == rows(plain.test)  # these never change
    seen = set()
    for epoch in range(20):
        (x, _), (full, _) = next(data.train.epoch(epoch)), next(whole.train.epoch(epoch))
        assert torch.equal(x, next(data.train.epoch(epoch))[0])  # the same again
        places = [[(top, left) for top in range(9) for left in range(9)
                   if torch.equal(full[i, :, top:top + 16, left:left + 16], x[i])] for i in range(24)]
        assert all(len(place) == 1 for place in places)
        seen |= {place[0] for place in places}
    assert len(seen) == 81  # every place
    assert torch.equal(data.train.examples(3), whole.train.examples(3)[:, :, 4:20, 4:20])


# --- the command line

def test_a_data_set_detected_and_one_named_are_the_same_run(tmp_path):
    write_images(tmp_path, 24)
    flags = ("--data-folder", "images", "--hidden-size", "4", "--k", "8", "--batch-size", "8", "--device", "cpu",
             "--image-size", "16", "--random-crop", "1.25", "--flip", "--precision", "fp32", "--output-folder")
    code, out, err = call(tmp_path, "vqvae.py", *flags, "a", "--num-epochs", "1")
    assert code == 0 and "data: folder, images: 20 train, 2 valid, 2 test, size: 16x16" in out, err
    code, out, err = call(tmp_path, "vqvae.py", *flags, "a", "--num-epochs", "2", "--dataset", "folder", "--resume")
    assert code == 0 and "resuming" in out, err
    code, _, err = call(tmp_path, "vqvae.py", *flags, "b", "--num-epochs", "2")
    assert code == 0, err
    resumed, whole = (checkpoint.load(tmp_path / "models" / name / "last.pt", "vqvae") for name in "ab")
    assert whole["args"]["dataset"] == "folder"
    assert all(torch.equal(value, whole["model"][name]) for name, value in resumed["model"].items())


@pytest.mark.parametrize("size", [(1, 1), (1, 40)])
def test_images_smaller_than_a_code_are_reconstructed(tmp_path, size):
    write_images(tmp_path, 24)
    flags = ("--data-folder", "images", "--hidden-size", "4", "--k", "8", "--batch-size", "8", "--device", "cpu")
    code, _, err = call(tmp_path, "vqvae.py", *flags, "--num-epochs", "1")
    assert code == 0, err
    Image.new("RGB", size, (200, 30, 9)).save(tmp_path / "small.png")
    code, out, err = call(tmp_path, "reconstruct.py", "--model", "models/vqvae/best.pt", "small.png", "--device", "cpu")
    assert code == 0 and f"{size[1]}x{size[0]}" in out, err
