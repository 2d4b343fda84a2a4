"""evaluate.py and reconstruct.py through their command lines."""
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchmetrics.image.lpip
from conftest import call, write_images
from PIL import Image

import evaluate
import metrics
from harness import checkpoint
from modules import VectorQuantizedVAE, load
from reconstruct import decode_latents, encode, list_sources, reach

VQVAE = ("--dataset", "folder", "--data-folder", "images", "--hidden-size", "8", "--k", "16", "--batch-size", "16",
         "--num-epochs", "1", "--device", "cpu", "--lr", "1e-3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with 60 images 16x16 and two VQ-VAEs of them."""
    path = tmp_path_factory.mktemp("evaluate")
    write_images(path, 60)
    for name, flags in (("a", ()), ("b", ("--ssim-weight", "1"))):
        code, _, err = call(path, "vqvae.py", *VQVAE, *flags, "--output-folder", name)
        assert code == 0, err
    return path


def test_one_table_picture_and_file_of_several_models(folder):
    code, out, err = call(folder, "evaluate.py", "--model", "models/a/best.pt", "models/b/best.pt", "--split", "test",
                          "--device", "cpu")
    assert code == 0, err
    found = json.loads((folder / "evaluation" / "results.json").read_text())
    assert set(found["models"]) == {"a", "b"} and found["setting"]["images"] == 6
    assert "EfficientNet-Lite0" in out and "96x96" in out and "N = 6" in out
    for name, figures in found["models"].items():
        trained = json.loads((folder / "models" / name / "results.json").read_text())
        assert figures["psnr"] == pytest.approx(trained["psnr"], abs=1e-4)
        low, high = figures["psnr_interval"]
        assert low <= figures["psnr"] <= high and figures["frechet_distance"] > 0
        assert figures["ms_per_step"] == trained["ms_per_step"]
    a, b = found["models"].values()
    mean, low, high = b["ssim_difference"]
    assert mean == pytest.approx(b["ssim"] - a["ssim"]) and low <= mean <= high and "ssim_difference" not in a
    assert b["psnr_of_mean_mse"] < b["psnr"] and f"{b['ssim_uniform']:.4g} [" in out and "ms_ssim" not in b
    assert f"| {b['psnr'] - a['psnr']:+.3g} [" in out and "| run - a " in out and "| run / a " in out
    low, high = b["paired_distance/effnet-lite0_interval"]
    assert low < b["paired_distance/effnet-lite0"] < high
    judged = found["setting"]["judged"]
    assert {"paired_distance/effnet-lite0", "frechet_distance/effnet-lite0"} <= set(judged)
    ratios = [b[f"{name}_ratio"][0] for name in judged]
    assert ratios == pytest.approx([b[name] / a[name] for name in judged])
    assert b["mean_of_judges_ratio"][0] == pytest.approx(math.prod(ratios) ** (1 / len(ratios)))
    assert f"| {b['mean_of_judges_ratio'][0]:.3g} " in out
    ratio, low, high = b["paired_distance/effnet-lite0_ratio"]
    assert low < ratio < high and b["frechet_distance/effnet-lite0_ratio"][1] is None
    assert max(len(line) for line in out.splitlines() if line.startswith("|")) <= 120
    assert all(line.count("| b ") for line in out.splitlines() if line.startswith("| b"))
    assert Image.open(folder / "evaluation" / "models.png").size[1] > 6 * 96  # and the middles, enlarged


def test_differences_are_run_minus_baseline_whatever_the_order(folder):
    code, out, err = call(folder, "evaluate.py", "--model", "models/a", "--baseline", "models/b", "--no-features",
                          "--device", "cpu", "--output", "against")
    assert code == 0 and "| run - b " in out and "run / b" not in out and "warning" not in out, err
    assert "valid split" in out  # test is asked for by name
    found = json.loads((folder / "against" / "results.json").read_text())["models"]
    assert list(found) == ["b", "a"]
    assert found["a"]["psnr_difference"][0] == pytest.approx(found["a"]["psnr"] - found["b"]["psnr"])


def test_a_model_that_is_unfinished_or_was_trained_for_less_is_named(folder):
    assert call(folder, "vqvae.py", *VQVAE, "--output-folder", "longer", "--num-epochs", "2")[0] == 0
    shutil.copytree(folder / "models" / "a", folder / "models" / "cut")
    shutil.copytree(folder / "models" / "a", folder / "models" / "timed")
    for name, asked in (("cut", {"num_epochs": 4}), ("timed", {"minutes": 2.})):  # more, and stopped with none better
        path = folder / "models" / name / "last.pt"
        contents = checkpoint.load(path, "vqvae")
        contents["args"] |= asked
        contents["counters"] |= {"epoch": 3, "step": 9, "seconds": 90.}
        checkpoint.save(path, "vqvae", contents)
    (folder / "models" / "shared").mkdir()
    shutil.copy(folder / "models" / "a" / "best.pt", folder / "models" / "shared")  # no file says how far its run came
    names = ("a", "longer", "cut", "timed", "shared")
    code, out, err = call(folder, "evaluate.py", "--model", *(f"models/{name}" for name in names), "--no-features",
                          "--device", "cpu", "--output", "uneven", "--data-folder", "images")
    assert code == 0, err
    assert [line for line in out.splitlines() if line.startswith("warning")] == [
        "warning: a was trained for 3 steps, cut for 9", "warning: longer was trained for 6 steps, cut for 9",
        "warning: cut is unfinished: 3 of 4 epochs are done", "warning: timed is unfinished: 1.5 of 2 minutes are done"]
    first = out.splitlines()[:7]
    assert "epochs | steps" in first[0] and [line.split("|")[2].strip() for line in first[2:]] == list("12331")
    found = json.loads((folder / "uneven" / "results.json").read_text(), parse_constant=pytest.fail)
    assert found["models"]["shared"]["ms_per_step"] is None and " – " in out
    shutil.copy(folder / "models" / "longer" / "last.pt", folder / "models" / "shared")
    code, _, err = call(folder, "evaluate.py", "--model", "models/shared", "--data-folder", "images")
    assert code == 2 and "best.pt is of another run than models/shared/last.pt" in err
    (folder / "models" / "longer" / "last.pt").write_bytes(b"cut short")  # results.json says that the run is finished
    assert call(folder, "evaluate.py", "--model", "models/longer", "--no-features", "--device", "cpu")[0] == 0


def test_a_split_and_a_runs_folder_are_taken_by_name(folder):
    for split in ("test", "valid"):
        code, out, err = call(folder, "evaluate.py", "--model", "models/a", "--split", split, "--no-features",
                              "--output", split, "--device", "cpu")
        assert code == 0 and f"{split} split, 6 images" in out, err
    valid, test = (json.loads((folder / split / "results.json").read_text())["models"]["a"]
                   for split in ("valid", "test"))
    assert valid["psnr"] != test["psnr"] and test["checkpoint"] == "models/a/best.pt"
    found = set()  # all 48 images of train, whatever the batches
    for size in ("32", "48"):
        code, _, err = call(folder, "evaluate.py", "--model", "models/a", "--split", "train", "--batch-size", size,
                            "--no-features", "--output", "train", "--device", "cpu")
        assert code == 0, err
        results = json.loads((folder / "train" / "results.json").read_text())
        found.add((results["setting"]["images"], round(results["models"]["a"]["psnr"], 4)))
    assert len(found) == 1


def test_a_judge_that_a_model_was_trained_through_is_marked(folder):
    contents = checkpoint.load(folder / "models/a/best.pt", "vqvae")
    (folder / "models/p").mkdir()
    contents["args"]["perceptual_weight"] = 1.
    checkpoint.save(folder / "models/p/best.pt", "vqvae", contents)
    for first, other in ("ap", "pa"):  # as a model, and as the baseline that another's ratios are to
        code, out, err = call(folder, "evaluate.py", "--model", f"models/{first}", f"models/{other}", "--device", "cpu",
                              "--data-folder", "images")
        assert code == 0, err
        figures, _, ratios = out.partition(f"| run / {first} ")
        of_models = figures.partition(f"| run - {first} ")[0].splitlines()
        a, p = ("".join(line for line in of_models if line.startswith(f"| {name} ")) for name in "ap")
        assert "†" not in a and p.count("†") == 4 and "† judged by the network" in out
        rows = [line for line in ratios.partition("other conventions")[0].splitlines()
                if line.startswith(f"| {other} ")]
        assert rows and all(cell.endswith(" †") for row in rows for cell in map(str.strip, row.split("|")[2:-1]))


def test_what_cannot_be_evaluated_is_one_line(folder, monkeypatch):
    (folder / "file").touch()
    code, out, err = call(folder, "evaluate.py", "--model", "models/a", "--no-features", "--device", "cpu", "--output",
                          "file/there")
    assert code == 2 and "file" in err and err.count("\n") == 1 and "| a " in out  # what was measured
    (folder / "mine").mkdir()
    (folder / "mine/models.png").touch()
    for output, says in (("images", "lies in the data folder"), ("images/new", "lies in the data folder"),
                         ("mine", "is of no evaluation")):
        code, _, err = call(folder, "evaluate.py", "--model", "models/a", "--no-features", "--output", output)
        assert code == 2 and says in err and err.count("\n") == 1
    assert not (folder / "images/models.png").exists() and not (folder / "mine/models.png").stat().st_size
    code, _, err = call(folder, "evaluate.py", "--model", "models/a", "--features", "classifier", "--device", "cpu")
    assert code == 2 and "at least two classes, this one has none" in err

    def unreachable(*args, **kwargs):
        raise OSError("no network:\ntry later")
    monkeypatch.setattr(torchmetrics.image.lpip, "LearnedPerceptualImagePatchSimilarity", unreachable)
    code, _, err = call(folder, "evaluate.py", "--model", "models/a", "--features", "lpips-alex", "--device", "cpu")
    assert code == 2 and "--features lpips-alex needs" in err and "no network: try later" in err
    assert err.count("\n") == 1


def test_a_judge_of_pairs_alone(folder, monkeypatch):
    class Stub(torch.nn.Module):
        def forward(self, x_tilde, x, normalize):
            return (x_tilde - x).abs().mean((1, 2, 3), keepdim=True)
    monkeypatch.setattr(torchmetrics.image.lpip, "LearnedPerceptualImagePatchSimilarity",
                        lambda net_type: SimpleNamespace(net=Stub()))
    code, out, err = call(folder, "evaluate.py", "--model", "models/a", "--features", "lpips-alex", "effnet-lite0",
                          "--output", "pairs", "--device", "cpu")
    assert code == 0 and "LPIPS through AlexNet" in out, err
    figures = json.loads((folder / "pairs" / "results.json").read_text())["models"]["a"]
    low, high = figures["paired_distance/lpips-alex_interval"]
    assert 0 < low < figures["paired_distance/lpips-alex"] < high and "frechet_distance/lpips-alex" not in figures
    assert figures["frechet_distance"] == figures["frechet_distance/effnet-lite0"]


def test_flags_that_a_prior_does_not_read_are_refused(folder):
    for flags in (("--features", "classifier"), ("--no-features",), ("--output", "there"), ("--baseline", "models/a")):
        code, _, err = call(folder, "evaluate.py", "--prior", "models/prior", *flags)
        assert code == 2 and "leave out --baseline, --features, --no-features, --output and further models" in err
    for flags in (("--samples", "5"), ("--temperature", "0.5"), ("--top-k", "3"), ("--seed", "1")):
        code, _, err = call(folder, "evaluate.py", "--model", "models/a", *flags)
        assert code == 2 and f"{flags[0]} is for --prior" in err


def test_a_folder_that_holds_out_other_images_than_a_model_was_trained_without_is_said(folder, tmp_path):
    for count, warned in ((60, False), (61, True), (40, True)):
        write_images(tmp_path / str(count), count)
        if count == 40:  # the same files, sorted into splits
            for split in ("train", "valid", "test"):
                (tmp_path / "40/images" / split).mkdir()
                for path in sorted((tmp_path / "40/images").glob("*.png"))[:13]:
                    path.rename(path.parent / split / path.name)
        code, out, err = call(folder, "evaluate.py", "--model", "models/a", "--data-folder",
                              tmp_path / str(count) / "images", "--no-features", "--device", "cpu", "--output", "other")
        assert code == 0 and ("its figures are too good" in out) == warned, (out, err)
    for name, count in (("split", 40), ("other", 61)):
        code, _, err = call(folder, "vqvae.py", *VQVAE, "--data-folder", tmp_path / str(count) / "images",
                            "--output-folder", name)
        assert code == 0, err
    code, out, err = call(folder, "evaluate.py", "--model", "models/split", "models/other", "--data-folder",
                          tmp_path / "40/images", "--no-features", "--device", "cpu", "--output", "other")
    assert code == 0 and "models/other/best.pt held out other images" in out and "models/split/best.pt held" not in out


def test_models_of_other_data_and_missing_ones_are_refused(folder):
    assert call(folder, "vqvae.py", *VQVAE, "--image-size", "12", "--output-folder", "small")[0] == 0
    code, _, err = call(folder, "evaluate.py", "--model", "models/a/best.pt", "models/small/best.pt")
    assert code == 2 and "evaluate them apart" in err
    code, _, err = call(folder, "evaluate.py", "--model", "models/nothing/best.pt")
    assert code == 2 and "no checkpoint at" in err


def test_bootstrap_interval_covers_the_mean_of_a_known_distribution():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = metrics.bootstrap_interval(values)
    assert low < values.mean() < high and high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert metrics.bootstrap_interval(torch.ones(5)) == (1., 1.)


def test_short_names_tell_models_apart():
    assert evaluate.short_names(["models/a/best.pt", "models/b/best.pt"]) == {
        "models/a/best.pt": "a", "models/b/best.pt": "b"}
    assert evaluate.short_names(["a/best.pt", "a/last.pt"]) == {"a/best.pt": "a/best.pt", "a/last.pt": "a/last.pt"}
    assert evaluate.short_names(["original/best.pt"]) == {"original/best.pt": "original/best.pt"}


# --- reconstruct.py

@pytest.mark.parametrize("size", [(64, 64), (301, 150), (130, 333), (1, 1)])
@pytest.mark.parametrize("downsample", [4, 8, 16])
def test_tiles_give_what_the_whole_gives(size, downsample):
    torch.manual_seed(0)
    model, x = VectorQuantizedVAE(3, 8, 16, downsample=downsample).eval(), torch.rand(1, 3, *size) * 2 - 1
    sides = [-(-side // downsample) for side in size]
    padded = torch.nn.functional.pad(x, (0, sides[1] * downsample - size[1], 0, sides[0] * downsample - size[0]),
                                     mode="replicate")
    with torch.no_grad():
        latents, whole = model.encode(padded), model(padded)[0]
    assert torch.equal(encode(model, x, 1024), latents) and torch.equal(encode(model, x, 50), latents)
    for tile in (1024, 50):
        torch.testing.assert_close(decode_latents(model, latents, tile), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("downsample", [4, 8, 16])
def test_the_reach_is_what_a_pixel_depends_on(downsample):
    torch.manual_seed(0)
    model = VectorQuantizedVAE(1, 8, downsample=downsample).double().eval()
    for layer in (*model.encoder.modules(), *model.decoder.modules()):  # so that nothing cancels or is cut off
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            layer.weight.data = layer.weight.data.abs() / layer.weight.data.abs().sum()
    side, found = 16 * downsample * 2, 0
    for pixel in range(side // 2, side // 2 + downsample):
        x = torch.ones(1, 1, downsample, side, dtype=torch.double, requires_grad=True)
        model.decoder(model.encoder(x))[..., pixel].sum().backward()
        seen = x.grad.abs().sum((0, 1, 2)).nonzero().flatten()
        found = max(found, pixel - int(seen[0]), int(seen[-1]) - pixel)
    assert found <= reach(model) <= found + 2 * downsample


def test_files_whose_names_meet_are_told_apart(folder):
    photos = folder / "meet"
    photos.mkdir()
    for name in ("a.png", "a.bmp", "b.png"):
        Image.new("RGB", (16, 16), (len(name), 99, 9)).save(photos / name)
    code, out, err = call(folder, "reconstruct.py", "--model", "models/a/best.pt", "meet")
    assert code == 0, err
    assert sorted(path.name for path in (folder / "reconstructions" / "meet").iterdir()) == [
        "a.bmp.png", "a.png.png", "b.png"]
    assert not any(".." in name.parts for _, name in list_sources([photos / ".."]))  # nor does one leave the output


def test_reconstructs_files_of_every_kind(folder):
    photos = folder / "photos"
    photos.mkdir()
    for mode, name in (("L", "grey.png"), ("CMYK", "cmyk.jpg"), ("RGBA", "alpha.png"), ("RGB", "odd.png")):
        Image.new(mode, (33, 17)).save(photos / name)
    Image.fromarray(np.full((17, 33), 30000, dtype=np.uint16)).save(photos / "16bit.png")
    code, out, err = call(folder, "reconstruct.py", "--model", "models/a/best.pt", "photos", "images/0.png")
    assert code == 0, err
    for name in ("photos/grey", "photos/cmyk", "photos/alpha", "photos/odd", "photos/16bit", "0"):
        assert f"{name}.png" in out and (folder / "reconstructions" / f"{name}.png").exists()
    picture = Image.open(folder / "reconstructions" / "photos" / "odd.png")
    assert picture.size == (2 * 33 + 3 * 4, 17 + 2 * 4)  # original | reconstruction, in a frame of 4 pixels

    assert "| original, reconstruction " in out

    (photos / "broken.png").write_bytes(b"broken")
    code, _, err = call(folder, "reconstruct.py", "--model", "models/a/best.pt", "photos", "--output", "none")
    assert code == 2 and "broken.png does not decode" in err and not (folder / "none").exists()
    again = ("reconstruct.py", "--model", "models/a/best.pt", "photos", "--overwrite")
    code, _, err = call(folder, *again)
    assert code == 2 and "broken.png does not decode" in err
    code, out, _ = call(folder, *again, "--skip-broken")
    assert code == 0 and "skipped 1 broken images of 6" in out
    code, _, err = call(folder, "reconstruct.py", "--model", "models/a/best.pt", "nowhere.png")
    assert code == 2 and "nowhere.png does not exist" in err


LATENTS = ("reconstruct.py", "--model", "models/a/best.pt", "--device", "cpu")


def test_saved_latents_decode_to_the_reconstructions(folder):
    for name, size in (("b.png", (33, 17)), ("c.png", (1, 16))):  # one pixel high
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    code, out, err = call(folder, *LATENTS, "b.png", "c.png", "images", "--save-latents", "out.npz", "--output", "one")
    assert code == 0 and "images: out.npz" in out, err
    assert call(folder, *LATENTS, "--from-latents", "out.npz", "--output", "two")[0] == 0
    pairs = sorted((folder / "one").rglob("*.png"))
    assert [path.relative_to(folder / "one") for path in pairs] == [
        path.relative_to(folder / "two") for path in sorted((folder / "two").rglob("*.png"))]
    for path in pairs:
        image = np.array(Image.open(folder / "two" / path.relative_to(folder / "one")))
        height, width = image.shape[:2]
        assert np.array_equal(np.array(Image.open(path))[4:4 + height, 8 + width:8 + 2 * width], image)
    for flags, words in ((("b.png", "--save-latents", "out.npz", "--output", "three"), "out.npz exists"),
                         (("--from-latents", "out.npz", "--output", "two"), "exists"),
                         (("b.png", "--save-latents", "c.png", "--overwrite"), "must end in .npz"),
                         (("b.png", "--from-latents", "out.npz"), "give images, or --from-latents"),
                         ((), "give images, or --from-latents")):
        code, _, err = call(folder, *LATENTS, *flags)
        assert code == 2 and err.count("\n") == 1 and words in err, err
    assert not (folder / "three").exists()


@pytest.mark.parametrize("change, words", [
    ({"model": "another"}, "another model"), ({"latents_0": np.full((4, 4), 99999)}, "do not fit"),
    ({"latents_0": np.full((4, 4), -1)}, "do not fit"), ({"sizes": np.array([[16, 99]])}, "do not fit"),
    ({"latents_0": np.zeros((4, 4))}, "damaged"), ({"latents_0": np.zeros((4, 4, 1), int)}, "damaged"),
    ({"sizes": np.array([[16., 16.]])}, "damaged"), ({"sizes": np.array([[16, 16]] * 2)}, "damaged"),
    ({"sizes": np.array([[0, 0]]), "latents_0": np.zeros((0, 0), int)}, "damaged"),
    ({"names": np.array(["a.png"] * 2), "sizes": np.array([[16, 16]] * 2), "latents_1": np.zeros((4, 4), int)},
     "damaged"), ({"names": np.array(["a\0.png"])}, "damaged"),
    ({"names": np.array(["../x.png"])}, "damaged"), ({"names": np.array(["a.png", "b.png"])}, "damaged"),
    (b"no npz", "damaged"), (b"PK", "damaged"), (b"", "damaged")])
def test_a_file_of_latents_that_does_not_fit_is_one_line(folder, change, words):
    assert call(folder, *LATENTS, "images/0.png", "--save-latents", "a.npz", "--overwrite")[0] == 0
    if isinstance(change, bytes):
        (folder / "a.npz").write_bytes(change)
    else:
        with np.load(folder / "a.npz") as file:
            np.savez(folder / "a.npz", **dict(file) | change)
    code, _, err = call(folder, *LATENTS, "--from-latents", "a.npz", "--output", "out")
    assert code == 2 and err.count("\n") == 1 and words in err and "a.npz" in err, err
    assert not (folder / "out").exists()


def test_a_folder_with_nothing_but_the_weights_is_a_model(folder):
    alone = folder / "pretrained" / "photos"
    alone.mkdir(parents=True)
    kept = torch.load(folder / "models" / "a" / "best.pt", weights_only=True)
    kept["args"]["data_folder"] = "data"
    torch.save({name: value for name, value in kept.items() if name not in ("optimizer", "average", "random", "best")},
               alone / "best.pt")
    code, out, err = call(folder, "reconstruct.py", "--model", "pretrained/photos", "images/0.png", "--output", "first")
    assert code == 0 and "first/0.png" in out, err
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(load(alone)(x)[0], load(folder / "models" / "a")(x)[0])
    for script, *flags in (("evaluate.py", "--data-folder", "images", "--no-features"),
                           ("vqvae.py", *VQVAE, "--num-epochs", "1", "--output-folder", "decoder")):
        code, _, err = call(folder, script, "--frozen-codebook" if flags[0] == "--dataset" else "--model",
                            "pretrained/photos", *flags)
        assert code == 0, err
