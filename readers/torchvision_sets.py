"""Data sets that torchvision reads and downloads."""
from pathlib import Path

import torch

from harness.errors import UserError


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
