"""Which folders are the splits and the classes of a data set, by their names and by where the images lie."""
import re
from itertools import islice
from pathlib import Path

from harness.errors import UserError
from harness.images import holds_image, identity, is_passed_over

ALIASES = {"train": ("train", "training", "trainval"), "valid": ("valid", "val", "validation"),
           "test": ("test", "testing")}
SPLITS = tuple(ALIASES)
SPLIT_OF = {alias: split for split, aliases in ALIASES.items() for alias in aliases}
NAMES = "|".join(sorted(SPLIT_OF, key=len, reverse=True))
PLAIN = "(?:images?|imgs?|pictures?|pics?|photos?|jpe?gs?|pngs?|files?|folder|data|datasets?|sets?|split|all|raw|px|x)"
PLAIN_SPLIT = re.compile(f"{PLAIN}*({NAMES}){PLAIN}*")  # of the letters of a name: train2017, img_train, testSet
ANY_SPLIT = re.compile(rf"(?<![^\W\d_])({NAMES})(?![^\W\d_])")  # within a name: DIV2K_train_HR, and bullet_train
WORD_BEGINS = re.compile("(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")  # trainA, myTest, HRTrain
NO_CLASS = re.compile(f"{PLAIN}+")  # of the letters of a name: images, JPEG_files


def _letters(name):
    return "".join(filter(str.isalpha, name.lower()))


def split_of(name):
    """The split that a folder of this name is, whatever its case, digits, and words such as "set" or "images"."""
    match = PLAIN_SPLIT.fullmatch(_letters(name))
    return match and SPLIT_OF[match[1]]


def _folders_in(root):
    return sorted(path for path in root.iterdir()
                  if path.is_dir() and not path.name.startswith(".") and not is_passed_over(path))


def _and(paths):
    return " and ".join(map(str, paths))


# --- splits

def split_folders(root):
    """{split: its folder in root}, by their names; empty where there is none.

    Raises:
        UserError: two folders are one split, or there are others but no train.
    """
    folders, found = _folders_in(root), {}
    named = [(split_of(folder.name), folder) for folder in folders if split_of(folder.name)]
    for split, folder in named or _alike(folders):
        if split in found:
            raise UserError(f"{found[split]} and {folder} are both the {split} split: keep one of them")
        found[split] = folder
    if found and "train" not in found:
        raise UserError(f"{_and(found.values())} without a folder train next to it: add it or rename")
    return found


def _alike(folders):
    """[(split, folder)] of folders whose names differ in the split alone, such as DIV2K_train_HR and DIV2K_valid_HR."""
    pairs = _pairs(_names(folders))
    return pairs[0] if len(pairs) == 1 else []


def _names(folders):
    """{folder: its name in small letters}.

    trainA becomes train_a only if no name holds a split otherwise, and all folders that hold images are then in pairs.
    """
    names = {folder: folder.name.lower() for folder in folders}
    if any(map(ANY_SPLIT.search, names.values())):
        return names
    words = {folder: WORD_BEGINS.sub("_", folder.name).lower() for folder in folders}
    paired = {folder for pair in _pairs(words) for _, folder in pair}
    return words if paired and not any(map(holds_image, words.keys() - paired)) else names


def _pairs(names):
    """[[(split, folder)]] of {folder: name}: those whose names differ in the split alone, of two splits or more."""
    groups = {}
    for folder, name in names.items():
        match = ANY_SPLIT.search(name)
        if match:
            rest = name[:match.start()], name[match.end():]
            groups.setdefault(rest, []).append((SPLIT_OF[match[1]], folder))
    return [group for group in groups.values() if len({split for split, _ in group}) > 1]


def find_splits(root):
    """{split: folder}, and the folders next to them; {"train": folder of the classes} where there are no splits.

    They are looked for in root, or where a folder that is alone in it leads.

    Raises:
        UserError: as in `split_folders`, or a folder may be a split as well as a class.
    """
    inner, seen = root, set()
    while identity(inner) not in seen:
        seen.add(identity(inner))
        found = split_folders(inner)
        others = [folder for folder in _folders_in(inner) if folder not in found.values()]
        _refuse_unclear(found, others)
        if found:
            if inner != root or any(folder.name.lower() not in SPLIT_OF for folder in found.values()):
                print("splits: " + ", ".join(f"{split} is {folder}" for split, folder in found.items()))
            return {split: found[split] for split in SPLITS if split in found}, others
        leading = list(islice(filter(holds_image, others), 2))  # to know that there is one
        if len(leading) != 1 or holds_image(inner, deep=False) or holds_image(leading[0], deep=False):
            break
        inner = leading[0]
    return {"train": inner}, []


def _refuse_unclear(found, others):
    """UserError where folders may be splits or classes: a train that is alone among others, or a part of a name."""
    if not found:
        unclear = [folder for folder, name in _names(others).items() if ANY_SPLIT.search(name) and holds_image(folder)]
    else:
        unclear = list(found.values()) if len(found) == 1 and any(map(holds_image, others)) else []
    if unclear:
        raise UserError(f"{_and(unclear[:3])} may be a split or a class: where it is a split, rename it to train, "
                        "valid or test and put nothing else next to it; where it is a class, put the folders of all "
                        "classes into a folder train")


def refuse_splits_within(splits):
    """UserError where, of {split: (folder, images below it)}, one lies in a folder that is named as another split."""
    for split, (root, paths) in splits.items():
        for folder in sorted({path.parent for path in paths}):
            for depth in range(len(root.parts), len(folder.parts)):
                if split_of(folder.parts[depth]) not in (None, split):
                    inner = Path(*folder.parts[:depth + 1])
                    raise UserError(f"{inner} is named as a split but lies within {inner.parent}: make the splits the "
                                    f"outermost folders, say {root / inner.name / inner.parent.name}, or rename it")


# --- classes

def with_classes(splits):
    """{split: (folder, its images)} -> {split: [(image, class or None)]} and the sorted classes, none or of all images.

    A class is the first folder below the split, but for a lone one that is named as the split or as no class is, such
    as images. A few images that lie in none are left out; where there are many, or a whole split, there are no classes.
    """
    rows = {split: list(zip(paths, _first_folders(folder, paths))) for split, (folder, paths) in splits.items()}
    classes = sorted({name for part in rows.values() for _, name in part if name is not None})
    loose = {split: [path for path, name in part if name is None] for split, part in rows.items()}
    strays, total = sum(map(len, loose.values())), sum(map(len, rows.values()))
    if not strays or not classes:
        return rows, classes
    first = min(path for paths in loose.values() for path in paths)
    if any(len(loose[split]) == len(rows[split]) for split in rows) or strays >= (total - strays) / len(classes):
        print(f"no classes: {strays} of {total} images lie in no class folder, such as {first}")
        return {split: [(path, None) for path, _ in part] for split, part in rows.items()}, []
    print(f"left out {strays} images that lie next to the class folders, such as {first}")
    return {split: [row for row in part if row[1] is not None] for split, part in rows.items()}, classes


def _first_folders(folder, paths):
    """Of each image below a folder the name of the first folder on the way to it, None where it lies in that itself."""
    depth, outer = len(folder.parts), folder.name
    while True:
        names = [path.parts[depth] if len(path.parts) > depth + 1 else None for path in paths]
        if len(set(names)) > 1 or names[0] is None or not _is_wrapping(names[0], outer):
            return names
        depth += 1


def _is_wrapping(name, split):
    """Whether a folder that is alone in that of a split is no class: train/images, train/train, train/train_set."""
    return bool(NO_CLASS.fullmatch(_letters(name))) or name == split or split_of(name) == split_of(split) is not None
