"""Splits and classes of folders as people have them: recognised, or refused with a line that names the folders."""
import os
import shutil

import pytest
from test_datasets import pictures

from datasets import Source
from readers.image_folders import image_folder
from readers.splits import split_of


def make(folder, layout):
    """Write images, each of its own, to {path: count}."""
    for i, (path, count) in enumerate(layout.items()):
        pictures(folder / path, count, seed=i)


def opened(folder):
    """{split: number of images} and the classes, each with the folders that its images lie in."""
    splits, classes = image_folder(Source(str(folder)))
    named = {name: set() for name in classes}
    for files, labels in splits.values():
        for path, label in zip(files.paths, labels.tolist()):
            if classes:
                named[classes[label]].add(str(path.parent.relative_to(folder)))
    return {split: len(files) for split, (files, _) in splits.items()}, named


ALL = {"train": 5, "valid": 3, "test": 2}
TRAIN_TEST = {"train": 5, "test": 2}
NAMES = [("train", "valid", "test"), ("Train", "Val", "TEST"), ("training", "validation", "testing"),
         ("train2017", "val2017", "test2017"), ("train_set", "val_set", "test_set"),
         ("training_set", "val", "test_set"), ("trainingSet", "validSet", "testSet"),
         ("img_train", "img_val", "img_test"), ("train-images", "val", "test"),
         ("TrainData", "ValData", "TestData"), ("trainval", "validation", "test"), ("1_train", "2_val", "3_test"),
         ("DIV2K_train_HR", "DIV2K_valid_HR", "DIV2K_test_HR"), ("train_64x64", "valid_64x64", "test_64x64"),
         ("seg_train", "seg_val", "seg_test"), ("train (1)", "val (1)", "test (1)"), ("X_train", "X_val", "X_test"),
         ("trainHR", "validHR", "testHR"), ("myTrain", "myVal", "myTest")]


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("wrapping", [".", "archive", "dataset/data"])
def test_splits_are_recognised(tmp_path, names, wrapping):
    make(tmp_path, {f"{wrapping}/{name}/{label}": count - (label == "cat") for name, count in zip(names, (3, 2, 2))
                    for label in ("cat", "dog")})
    counts, classes = opened(tmp_path)
    assert counts == {"train": 5, "valid": 3, "test": 3} and list(classes) == ["cat", "dog"]
    assert all(path.endswith(name) for name, paths in classes.items() for path in paths)


LAYOUTS = [  # what lies where, what is read, and the classes
    ("COCO", {"train2017": 5, "val2017": 3}, {"train": 5, "valid": 3}, []),
    ("YOLO", {"images/train": 5, "images/val": 3, "images/test": 2}, ALL, []),
    ("YOLO, the other way", {"train/images": 5, "valid/images": 3, "test/images": 2}, ALL, []),
    ("a split twice", {"train/train/cat": 5, "test/test/cat": 2}, TRAIN_TEST, ["cat"]),
    ("a split twice, flat", {"train/train": 5, "test/test1": 2}, TRAIN_TEST, []),
    ("a split twice, by its own name", {"seg_train/seg_train/a": 5, "seg_test/seg_test/a": 2}, TRAIN_TEST, ["a"]),
    ("images, then classes", {"train/images/cat": 3, "train/images/dog": 2, "test/images/cat": 2}, TRAIN_TEST,
     ["cat", "dog"]),
    ("a class of a split's name", {"train/bus": 3, "train/train": 2, "test/bus": 2}, TRAIN_TEST, ["bus", "train"]),
    ("classes within one train", {"train/bullet_train": 3, "train/test_tube": 2}, {"train": 5},
     ["bullet_train", "test_tube"]),
    ("classes that begin as splits do", {"Trainer": 3, "TESTUDO": 2}, {"train": 5}, ["TESTUDO", "Trainer"]),
    *((" and ".join(names), dict.fromkeys(names, 3), {"train": 3 * len(names)}, sorted(names)) for names in (
        ["TestTube", "Beaker"], ["BulletTrain", "Car"], ["TrainStation", "Airport"], ["ValKilmer", "TomHanks"],
        ["DeathVal"], ["McTest"], ["myTrain"], ["iPhoneTest", "canon"], ["crashTest", "crashReal"],
        ["crashTest", "crashReal", "crashTrain"], ["TestTube", "TrainStation"])),
    ("only case tells the words apart, next to notes", {"trainHR": 5, "testHR": 2, "notes": 0}, TRAIN_TEST, []),
    ("station", {"train/train_station": 3, "train/house": 2}, {"train": 5}, ["house", "train_station"]),
    ("photographs", {"": 5}, {"train": 5}, []),
    ("classes", {"cat": 3, "dog": 2}, {"train": 5}, ["cat", "dog"]),
    ("classes one level deeper", {"archive/cat": 3, "archive/dog": 2}, {"train": 5}, ["cat", "dog"]),
    ("classes two levels deeper", {"a/b/cat": 3, "a/b/dog": 2}, {"train": 5}, ["cat", "dog"]),
    ("one class", {"cat": 5}, {"train": 5}, ["cat"]),
    ("a folder of images", {"images": 5}, {"train": 5}, []),
    ("classes in folders", {"cat/young": 3, "cat/old": 1, "dog": 1}, {"train": 5}, ["cat", "dog"]),
    ("one stray image", {"": 1, "cat": 3, "dog": 2}, {"train": 5}, ["cat", "dog"]),
    ("one stray image in a split", {"train": 1, "train/cat": 3, "train/dog": 2, "test/cat": 2}, TRAIN_TEST,
     ["cat", "dog"]),
    ("as many that are in no class", {"": 3, "album": 2}, {"train": 5}, []),
    ("a split without classes", {"train/cat": 3, "train/dog": 2, "test": 2}, TRAIN_TEST, []),
    ("masks next to the splits", {"train": 5, "test": 2, "train_masks": 4, "test_masks": 1}, TRAIN_TEST, []),
    ("thumbnails", {"cat": 3, "dog": 2, "@eaDir/x.jpg": 4, "cat/@eaDir/a.jpg": 2}, {"train": 5}, ["cat", "dog"]),
    ("what a Mac adds", {"train/cat": 5, "test/cat": 2, "__MACOSX/train": 4}, TRAIN_TEST, ["cat"]),
]


@pytest.mark.parametrize("layout, counts, classes", [row[1:] for row in LAYOUTS],
                         ids=[row[0] for row in LAYOUTS])
def test_layouts(tmp_path, layout, counts, classes):
    make(tmp_path, layout)
    found, named = opened(tmp_path)
    assert found == counts and list(named) == classes


REFUSED = [
    ("splits within classes", {"cat/train": 3, "cat/test": 2, "dog/train": 3}, "cat/test is named as a split"),
    ("two data sets", {"a/train": 3, "a/test": 2, "b/train": 3, "b/val": 2}, "a/test is named as a split"),
    ("splits within a split", {"train/cat/test": 3, "train/cat/a": 3}, "cat/test is named as a split"),
    ("splits deeper next to others", {"archive/val": 3, "archive/train": 3, "more": 2}, "val is named as a split"),
    ("train among classes", {"bus": 3, "car": 3, "train": 3}, "train may be a split or a class"),
    ("train next to images", {"train": 3, "masks": 3}, "train may be a split or a class"),
    ("part of a name", {"bullet_train": 3, "steam_engine": 3}, "bullet_train may be a split or a class"),
    ("parts of names", {"train_station": 3, "crash_test": 3}, "crash_test and "),
    ("two kinds of splits", {"a_train_x": 3, "a_test_x": 3, "b_train_y": 3, "b_test_y": 3}, "a_test_x and "),
    ("part of a name, pairs by case", {"my_train": 3, "myTest": 3}, "my_train may be a split or a class"),
    ("CycleGAN", {"trainA": 3, "trainB": 3, "testA": 3, "testB": 3}, "testA and "),
    ("a split twice", {"train2014": 3, "train2017": 3, "val2017": 2}, "train2014 and "),
    ("no train", {"val2017": 3, "test2017": 2}, "without a folder train"),
]


@pytest.mark.parametrize("layout, message", [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_may_be_a_split_or_a_class_is_refused(tmp_path, layout, message):
    make(tmp_path, layout)
    with pytest.raises(ValueError) as caught:
        image_folder(Source(str(tmp_path)))
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["cat", "trains", "constraint", "contest", "latest", "valley", "invalid", "test_tube",
                                  "images", "train_station", "2017", "traintest"])
def test_other_names_are_no_splits(name):
    assert split_of(name) is None


# --- one image in two splits

def link(source, target):
    target.symlink_to(source)


@pytest.mark.parametrize("bring", [link, os.link, shutil.copy])
@pytest.mark.parametrize("one, two", [("train", "test"), ("train", "val"), ("val", "test")])
def test_a_file_whose_content_is_in_two_splits_is_refused(tmp_path, bring, one, two):
    make(tmp_path, {"train/cat": 5, "val/cat": 3, "test/cat": 2})
    opened(tmp_path)
    bring(tmp_path / one / "cat" / "001.png", tmp_path / two / "cat" / "copy.jpg")
    with pytest.raises(ValueError, match="of the .* split is the same image as .* of the .* split") as caught:
        opened(tmp_path)
    assert f"{one}/cat/001.png" in str(caught.value) and f"{two}/cat/copy.jpg" in str(caught.value)


def test_copies_are_left_out_where_splits_are_carved(tmp_path, capsys):
    make(tmp_path, {"cat": 30, "dog": 20})
    alone, _ = opened(tmp_path)
    for number in (3, 7, 8):
        shutil.copy(tmp_path / "cat" / f"{number:03d}.png", tmp_path / "dog" / f"x{number}.png")
    shutil.copy(tmp_path / "cat" / "003.png", tmp_path / "cat" / "z.png")
    capsys.readouterr()
    assert opened(tmp_path)[0] == alone == {"train": 50}
    assert f"left out 4 copies of other images, such as {tmp_path}/cat/z.png\n" in capsys.readouterr().out
    for seed, split in enumerate(("valid", "test"), 2):  # nothing is carved: what a user gave is what is read
        pictures(tmp_path / split / "cat", 2, seed=seed)
    (tmp_path / "train").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / name).rename(tmp_path / "train" / name)
    assert opened(tmp_path)[0]["train"] == 54


def test_files_that_differ_in_a_few_bytes_are_no_copies(tmp_path):
    make(tmp_path, {"train/cat": 5, "test/cat": 2})
    data = bytearray(b"P5 100 100 255\n" + bytes(10000))
    for split, value in (("train", 1), ("test", 2)):
        data[100] = value  # neither in the middle nor at the end
        (tmp_path / split / "cat" / "z.pgm").write_bytes(data)
    source = Source(str(tmp_path), image_size=(8, 8))
    assert {split: len(files) for split, (files, _) in image_folder(source)[0].items()} == {"train": 6, "test": 3}
