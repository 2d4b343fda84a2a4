"""What is read of a folder of images, and what is said of the rest."""
import os

import numpy as np
import pytest
import tifffile
from conftest import call, write_images
from PIL import Image
from test_datasets import miniimagenet, open_folder, pictures, rows

from datasets import Source, fingerprint, load
from harness.decoding import OtherImage
from harness.images import find_images
from readers import survey
from readers.survey import Survey


def surveyed(paths, **how):
    return Survey({"train": paths}, **how)


# --- grey or colour, sizes

def test_images_that_must_be_enlarged_are_counted(tmp_path, capsys):
    survey = surveyed([*pictures(tmp_path / "small", 3, (8, 8)), *pictures(tmp_path / "large", 2, (20, 20))])
    for wanted, small in (((8, 8), 0), ((8, 9), 3), ((20, 21), 5)):
        assert survey.size(wanted) == wanted
        said = f"{small} of 5 images are smaller than {wanted[0]}x{wanted[1]} and are enlarged: that adds no detail\n"
        assert capsys.readouterr().out == said * bool(small)


@pytest.mark.parametrize("colour", [0, 50, 299])
@pytest.mark.parametrize("others", [99, 299])
def test_one_colour_image_makes_a_set_colour_wherever_it_is(tmp_path, capsys, others, colour):
    paths = pictures(tmp_path, others + 1, (4, 4), mode="L")
    path = paths[min(colour, others)]
    Image.new("RGB", (4, 4), (200, 0, 0)).save(path)
    data = open_folder(tmp_path, batch_size=1000)
    assert data.channels == 3
    grey = paths[0] if path != paths[0] else paths[1]
    assert f"{others} images are grey, such as {grey}, and 1 are not: all are read as colour" in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"{path} is a colour image, but the model is one of greyscale images"):
        load("folder", Source(str(tmp_path), channels=1), 4)


def test_palettes_of_greys_are_grey(tmp_path):
    paths = pictures(tmp_path, 12, mode="L")
    greys = [np.asarray(Image.open(path)) for path in paths]
    for path, mode in zip(paths[:4], ("P", "1", "LA", "P")):
        Image.open(path).convert(mode).save(path)
    data = load("folder", Source(str(tmp_path)), 100)
    assert data.channels == 1 and len(greys) == 12
    Image.new("RGB", (8, 8), (200, 30, 30)).convert("P").save(paths[0])
    assert open_folder(tmp_path).channels == 3


@pytest.mark.parametrize("number", [1, 150, 299])
def test_the_one_of_another_size_is_named_at_once(tmp_path, number):
    paths = pictures(tmp_path, 300, (4, 4))
    Image.new("RGB", (6, 4)).save(paths[number])
    with pytest.raises(ValueError, match=f"{paths[number]} is 4x6 but {paths[0]} is 4x4: pass --image-size"):
        surveyed(paths).size()
    assert surveyed(paths).size((2, 2)) == (2, 2)


def test_a_broken_file_is_found_wherever_it_is_and_many_are_read_by_processes(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.images.MANY_FILES", 16)
    paths = pictures(tmp_path, 40, (4, 4), mode="L")
    paths[33].write_bytes(b"nothing")
    with pytest.raises(ValueError, match=f"{paths[33]} does not decode"):
        surveyed(paths)
    assert surveyed(paths, skip_broken=True).greys == 39
    with pytest.raises(ValueError, match="none of 1 images decodes"):
        surveyed(paths[33:34], skip_broken=True)


# --- what a line says

def says(tmp_path, capsys):
    surveyed(sorted(tmp_path.iterdir())).say()
    return capsys.readouterr().out


@pytest.mark.parametrize("top, dark", [(4095, True), (65535, False)])
@pytest.mark.parametrize("channels", [1, 3])
def test_twelve_bits_in_sixteen_are_said(tmp_path, capsys, top, dark, channels):
    for i in range(20):
        values = np.random.default_rng(i).integers(0, top + 1, (8, 8, channels), dtype=np.uint16)
        tifffile.imwrite(tmp_path / f"{i}.tif", values.squeeze())
    out = says(tmp_path, capsys)
    assert out.startswith("20 images have 16 bits a value: 0 is read as black, 65535 as white, such as "
                          f"{tmp_path}/0.tif")
    assert ("scale values of 12 bits to 16" in out) == dark and out.count("\n") == 1


def test_several_kinds_are_a_line_each(tmp_path, capsys):
    frames = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (200, 100)]
    for i in range(3):
        frames[0].save(tmp_path / f"{i}.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "a.tif")
    assert sorted(says(tmp_path, capsys).splitlines()) == [
        f"1 images hold floats: 0 is read as black, 1 as white, such as {tmp_path}/a.tif",
        f"3 images hold several pictures or frames: the first is read, such as {tmp_path}/0.gif"]


def test_no_line_where_there_is_nothing_to_say(tmp_path, capsys):
    pictures(tmp_path, 20, mode="RGBA")
    assert open_folder(tmp_path).channels == 3 and not capsys.readouterr().out


def test_a_kind_that_would_be_read_wrong_stops_at_once(tmp_path):
    pictures(tmp_path, 12)
    tifffile.imwrite(tmp_path / "z.tif", np.zeros((3, 8, 8), np.uint16), photometric="rgb", planarconfig="separate")
    with pytest.raises(OtherImage, match="z.tif has channels in separate planes"):
        open_folder(tmp_path, skip_broken=True)


# --- what is no image

def test_what_is_no_image_is_counted_in_one_line(tmp_path, capsys):
    paths = pictures(tmp_path, 30)
    for name in ("paper.pdf", "a.h5", "a.mpg", "notes.txt", "b.txt", "0001", "c.heic", "figure.eps", "d.grib"):
        (tmp_path / name).write_bytes(b"no image")
    (tmp_path / ".DS_Store").write_bytes(b"hidden")
    for number in (1, 2):
        pictures(tmp_path / "@eaDir" / f"{number}.jpg", 1)
    found, = find_images(tmp_path)
    out = capsys.readouterr().out
    assert found == paths and out.count("\n") == 1
    assert "left out 9 files that are no images by their names (2 .txt, 1 " in out and "..." in out
    assert f"such as {tmp_path}/0001" in out
    assert out.endswith(f"the folders of results or thumbnails {tmp_path}/@eaDir\n")
    assert len(open_folder(tmp_path).train.labels) == 24


def test_heic_that_is_left_out_names_the_package(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("harness.images.UNREAD", {".heic"})
    monkeypatch.setattr("harness.images.is_image", lambda path: not str(path).endswith("HEIC"))
    pictures(tmp_path, 2)
    for number in range(12):
        (tmp_path / f"IMG_{number}.HEIC").write_bytes(b"a photograph")
    find_images(tmp_path)
    assert capsys.readouterr().out == (f"left out 12 files that are no images by their names (12 .heic), such as "
                                       f"{tmp_path}/IMG_0.HEIC: pip install pillow-heif to read HEIC\n")


def test_what_runs_keep_does_not_join_the_data(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "models/vqvae", "logs/vqvae", "photos/models"):
        pictures(tmp_path / name, 3)
    assert {path.parts[0] for path in find_images(".")[0]} == {"photos"}
    assert capsys.readouterr().out == "left out the folders of results or thumbnails ./logs, ./models\n"
    assert len(find_images("photos")[0]) == 6  # a folder of that name elsewhere is one like others
    assert len(find_images("models")[0]) == 3 == len(find_images("models/vqvae")[0])  # asked for by name


def test_links_bring_no_image_in_twice_nor_from_another_split(tmp_path):
    for i, (name, count) in enumerate((("train/cat", 12), ("test/cat", 4), ("elsewhere", 3))):
        pictures(tmp_path / "data" / name, count, seed=i)
    train = tmp_path / "data" / "train"
    alone = rows(open_folder(tmp_path / "data").train) | rows(open_folder(tmp_path / "data").valid)
    for name, target in (("up", ".."), ("beside", "../test"), ("within", "../test/cat"), ("again", "cat"),
                         ("gone", "nowhere"), ("self", "self")):
        (train / name).symlink_to(target, target_is_directory=True)
    data = open_folder(tmp_path / "data")
    assert len(data.train.labels) + len(data.valid.labels) == 12 and len(data.test.labels) == 4
    assert rows(data.train) | rows(data.valid) == alone and not rows(data.train) & rows(data.test)
    (train / "dog").symlink_to("../elsewhere", target_is_directory=True)  # a class that lies elsewhere
    assert open_folder(tmp_path / "data").classes == ["cat", "dog"]


def test_what_is_no_regular_file_is_left_out_and_said(tmp_path, capsys):
    pictures(tmp_path, 30)
    (tmp_path / "link.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    data = open_folder(tmp_path)
    assert len(data.train.labels) == 24
    assert "left out 2 that are no regular files" in capsys.readouterr().out
    fingerprint("folder", Source(str(tmp_path)))  # nor does it wait for the pipe


SMALL = ("--hidden-size", "4", "--k", "8", "--batch-size", "8", "--device", "cpu", "--precision", "fp32")


@pytest.mark.parametrize("data, name", [("models/own", "own"), ("models/own/images", "own"), ("link", "own"),
                                        ("./models/../models", "own"), ("logs/own", "own"), ("models/a", "a/b")])
def test_a_run_whose_pictures_would_join_its_data_is_refused(tmp_path, data, name):
    pictures(tmp_path / "models/own/images", 24, (16, 16))
    for path in ("logs/own", "models/a"):
        pictures(tmp_path / path, 24, (16, 16))
    (tmp_path / "link").symlink_to("models/own")
    code, _, err = call(tmp_path, "vqvae.py", *SMALL, "--data-folder", data, "--output-folder", name)
    assert code == 2 and f"--data-folder {data} would share files with " in err and err.count("\n") == 1
    assert not list(tmp_path.rglob("*.pt"))


def test_a_run_on_the_working_directory_goes_on_and_is_evaluated(tmp_path):
    write_images(tmp_path, 24)
    for more in ((), ("--resume",)):
        flags = (*SMALL, "--data-folder", ".", "--num-epochs", 1 + len(more), *more)
        code, out, err = call(tmp_path, "vqvae.py", *flags)
        assert code == 0 and "images: 20 train, 2 valid, 2 test" in out, err
        assert "left out the folders of results or thumbnails ./logs, ./models" in out or not more
    evaluate = ("evaluate.py", "--no-features")
    for script, *flags in (evaluate, ("reconstruct.py", "images/1.png"), evaluate):  # whose pictures are no data
        code, _, err = call(tmp_path, script, *flags, "--device", "cpu", "--model", "models/vqvae")
        assert code == 0, err


# --- lists

def test_labels_of_lists_are_stripped(tmp_path):
    miniimagenet(tmp_path)
    (tmp_path / "train.csv").write_text("filename,label\n000.jpg,dog \n001.jpg, dog\n002.jpg,\tcat\n")
    (tmp_path / "val.csv").write_text("filename,label\n003.jpg,dog\n")
    (tmp_path / "test.csv").write_text("filename,label\n004.jpg,cat\n")
    assert load("miniimagenet", Source(str(tmp_path), (16, 16)), 4).classes == ["cat", "dog"]


@pytest.mark.parametrize("text, message", [
    ("filename,label,label\n000.jpg,dog,cat\n", "must have the columns filename,label once"),
    ("filename,filename,label\n000.jpg,001.jpg,cat\n", "must have the columns filename,label once"),
    ("filename,label\n000.jpg,  \n", "row 2 has a cell missing"),
    ("filename,label\n../images/000.jpg,cat\n", "row 2 lists ../images/000.jpg, which is outside")])
def test_lists_that_are_not_clear_are_refused(tmp_path, text, message):
    miniimagenet(tmp_path)
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        load("miniimagenet", Source(str(tmp_path), (16, 16)), 4)


def test_a_copy_in_two_lists_is_refused(tmp_path):
    miniimagenet(tmp_path)
    (tmp_path / "images" / "003.jpg").write_bytes((tmp_path / "images" / "000.jpg").read_bytes())
    with pytest.raises(ValueError, match="images/003.jpg of the test split is the same image as .*images/000.jpg"):
        load("miniimagenet", Source(str(tmp_path), (16, 16)), 4)


def test_few_files_are_decoded_to_know_that_they_are_dark(tmp_path, monkeypatch):
    for i in range(50):
        Image.fromarray(np.full((4, 4), i, np.uint16)).save(tmp_path / f"{i}.png")
    found, read = surveyed(sorted(tmp_path.iterdir())), []
    monkeypatch.setattr(survey, "decode", lambda path: read.append(path) or np.zeros(1))
    found.say()
    assert 8 <= len(read) <= 10
