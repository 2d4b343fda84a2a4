"""Data sets that torchvision reads and downloads."""
from dataclasses import replace
from pathlib import Path

import torch

from harness.errors import UserError
from readers.image_folders import image_folder

IMAGENETTE_FOLDER, IMAGENETTE_SIZE = "imagenette2-160", (128, 128)


def torchvision_set(class_name, mark):
    def open_splits(source):
        from torchvision import datasets as tv
        dataset_class, splits = getattr(tv, class_name), {}
        for split in ("train", "test"):
            dataset = _open_torchvision(dataset_class, source, mark, train=split == "train")
            images = torch.as_tensor(dataset.data)
            images = images if images.ndim == 4 else images.unsqueeze(3)  # (N, H, W, C)
            splits[split] = (images, torch.as_tensor(dataset.targets))
        return splits, list(dataset.classes)
    open_splits.is_in = lambda root: (root / mark).exists()
    return open_splits


def imagenette(source):
    """Ten classes of ImageNet, JPEG files whose shorter side is 160 pixels; its split val is the test split here."""
    from torchvision import datasets as tv
    dataset = _open_torchvision(tv.Imagenette, source, IMAGENETTE_FOLDER, split="train", size="160px")
    source.image_size = source.image_size or IMAGENETTE_SIZE
    splits, classes = image_folder(replace(source, folder=str(Path(source.folder) / IMAGENETTE_FOLDER)))
    names = {wnid: words[0] for wnid, words in zip(dataset.wnids, dataset.classes)}
    return {"train": splits["train"], "test": splits["valid"]}, [names[wnid] for wnid in classes]


imagenette.is_in = lambda root: (root / IMAGENETTE_FOLDER).is_dir()


def _open_torchvision(dataset_class, source, mark, **options):
    """A data set of torchvision, downloaded where it is missing and that is allowed."""
    name = dataset_class.__name__
    try:
        return dataset_class(source.folder, download=False, **options)
    except Exception as error:
        if not (isinstance(error, RuntimeError) and "not found" in str(error)):
            raise UserError(f"{Path(source.folder) / mark} is damaged ({_one_line(error)}): delete it, and {name} is "
                            "downloaded anew") from error
        if not source.download:
            raise FileNotFoundError(f"{name} is not in {source.folder}, and --no-download forbids to fetch it"
                                    ) from error
    try:
        return dataset_class(source.folder, download=True, **options)
    except Exception as error:
        raise OSError(f"{name} is not in {source.folder} and cannot be downloaded ({_one_line(error)}): download it "
                      "elsewhere and pass its --data-folder") from error


def _one_line(error):
    """What went wrong, without line breaks: torchvision lists each address it tried on lines of its own."""
    return " ".join(str(error).split()) or type(error).__name__
