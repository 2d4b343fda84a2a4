"""A classifier of a data set's own classes: it learns, is kept, and is trained anew for other images."""
import pytest
import torch

import datasets
from datasets import Data, Source
from harness import checkpoint
from harness.batches import Batches
from study import classifier


def toy(folder, count=256, classes=3, side=16):
    """Images of noise, the left, right or no half brighter by class, and their source."""
    generator = torch.Generator().manual_seed(0)
    (folder / "images").mkdir(exist_ok=True)
    (folder / "images" / "one").write_bytes(b"1")
    labels = torch.randint(classes, (count,), generator=generator)
    images = torch.randint(100, (count, side, side, 3), generator=generator)
    for name, half in ((0, slice(0, side // 2)), (1, slice(side // 2, side))):
        images[labels == name, half] += 120
    images = images.byte()
    splits = [Batches(images, labels, 64, shuffle=split == "train") for split in datasets.SPLITS]
    return Data("folder", *splits, 3, (side, side), [str(i) for i in range(classes)]), Source(str(folder / "images"))


def test_classifier_learns_is_kept_and_depends_on_the_data_alone(tmp_path, monkeypatch):
    data, source = toy(tmp_path)
    state = torch.get_rng_state()
    model = classifier.open_classifier(data, source, tmp_path, epochs=6)
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    kept, = tmp_path.glob("classifier-*.pt")
    assert checkpoint.digest(kept)[:16] in model.description
    x, labels = next(iter(data.valid))
    with torch.no_grad():
        features = model((x + 1) / 2)
        right = model.logits(features).argmax(1) == labels
    assert features.shape == (64, model.features) and right.float().mean() > 0.9

    again = classifier.train_classifier(data, epochs=6)
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a, b), name

    def refuse(*args, **kwargs):
        raise AssertionError("trained again")
    monkeypatch.setattr(classifier, "train_classifier", refuse)
    cached = classifier.open_classifier(data, source, tmp_path, epochs=6)
    with torch.no_grad():
        torch.testing.assert_close(cached((x + 1) / 2), features)
    data_of = kept.read_bytes()
    for damaged in (b"", b"damaged"):
        kept.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged: delete it"):
            classifier.open_classifier(data, source, tmp_path, epochs=6)
    kept.write_bytes(data_of)
    contents = checkpoint.load(kept, "classifier")
    del contents["model"]["logits.weight"]
    checkpoint.save(kept, "classifier", contents)
    with pytest.raises(ValueError, match="is damaged: delete it"):
        classifier.open_classifier(data, source, tmp_path, epochs=6)
    (tmp_path / "images" / "two").write_bytes(b"22")  # other images: another classifier
    with pytest.raises(AssertionError, match="trained again"):
        classifier.open_classifier(data, source, tmp_path, epochs=6)


def test_classifier_names_what_is_wrong(tmp_path):
    data, source = toy(tmp_path, 8)
    data.classes = []
    with pytest.raises(ValueError, match="at least two classes, this one has none"):
        classifier.open_classifier(data, source, tmp_path)
    data.classes, data.size = ["a", "b"], (4, 4)
    with pytest.raises(ValueError, match="at least 8 pixels"):
        classifier.open_classifier(data, source, tmp_path)


def test_classes_that_train_lacks_are_refused(tmp_path):
    data, source = toy(tmp_path)
    data.train = Batches(data.train.images, data.valid.labels % 2, 64)
    with pytest.raises(ValueError, match="valid or test have 2, which train lacks"):
        classifier.open_classifier(data, source, tmp_path)


def test_shifted_images_move_by_whole_pixels():
    x = torch.rand(50, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    moved = classifier.shifted(x, torch.Generator().manual_seed(0))
    assert moved.shape == x.shape and not torch.equal(moved, x)
    inner = moved[:, :, 4:12, 4:12]
    shifts = [(dy, dx) for dy in (-2, -1, 0, 1, 2) for dx in (-2, -1, 0, 1, 2)]
    for i in range(50):
        assert any(torch.equal(inner[i], x[i, :, 4 + dy:12 + dy, 4 + dx:12 + dx]) for dy, dx in shifts)
