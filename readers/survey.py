"""What the headers of all images of a data set say: their size, grey or colour, and whether two splits share one."""
import hashlib
from array import array
from collections import Counter
from itertools import combinations

import numpy as np

from harness.decoding import DEEP, BrokenImage, decode
from harness.errors import UserError
from harness.images import probe_all

LOOKED_AT = 8  # files of 16 bits whose pixels tell whether they have fewer
DARK = 16  # of 255: what is white in 12 bits, read as 16


class Survey:
    """What all images of {split: paths} are.

    Raises:
        BrokenImage: one is broken and may not be skipped. OtherImage: one would be read wrong. UserError: all are
            broken, or two splits share one.
    """

    def __init__(self, splits, skip_broken=False):
        self.first = self.other = None  # (path, size) of the first image and of one that differs
        self.colour = self.grey = None  # the path of one
        self.colours, self.greys, self._sizes, self._noted = 0, 0, Counter(), {}
        marks = {split: array("Q") for split in splits}
        images = [(split, path) for split, paths in splits.items() for path in paths]
        for (split, path), header in zip(images, probe_all([path for _, path in images])):
            if isinstance(header, BrokenImage) and skip_broken:
                marks[split].append(0)
                continue
            if isinstance(header, Exception):
                raise header
            marks[split].append(header.mark)
            self._add(path, header)
        if not self.first:
            raise UserError(f"none of {len(images)} images decodes, the first is {images[0][1]}")
        refuse_shared(splits, marks)
        self._paths, self._marks = splits, marks

    def copies(self, split):
        """The paths of a split whose content an earlier one of it has."""
        marks, counts = np.unique(np.frombuffer(self._marks[split], np.uint64), return_counts=True)
        repeated, found, seen = set(marks[(counts > 1) & (marks > 0)].tolist()), set(), set()  # 0 is of the broken
        for path, mark in zip(self._paths[split], self._marks[split]):
            if mark in repeated:
                digest = _digest(path)
                found |= {path} if digest in seen else set()
                seen.add(digest)
        return found

    def _add(self, path, header):
        self.first = self.first or (path, header.size)
        if header.size != self.first[1]:
            self.other = self.other or (path, header.size)
        self._sizes[header.size] += 1
        if header.grey:
            self.greys, self.grey = self.greys + 1, self.grey or path
        else:
            self.colours, self.colour = self.colours + 1, self.colour or path
        for note in header.notes:
            self._noted.setdefault(note, []).append(path)

    def size(self, wanted=None):
        """The (H, W) to bring all to: what is wanted, else that of all. UserError where they differ."""
        if not wanted and self.other:
            (first, one), (path, other) = self.first, self.other
            raise UserError(f"{path} is {other[0]}x{other[1]} but {first} is {one[0]}x{one[1]}: pass --image-size to "
                            "bring all images to one size")
        small = sum(count for size, count in self._sizes.items() if wanted and any(map(int.__lt__, size, wanted)))
        if small:
            print(f"{small} of {self._sizes.total()} images are smaller than {wanted[0]}x{wanted[1]} and are enlarged: "
                  "that adds no detail")
        return tuple(wanted or self.first[1])

    def channels(self, wanted=None):
        """How many channels to read: what is wanted, else 1 where all are grey. UserError: grey wanted of colour."""
        if wanted == 1 and self.colour:
            raise UserError(f"{self.colour} is a colour image, but the model is one of greyscale images")
        if not wanted and self.colours and self.greys:
            print(f"{self.greys} images are grey, such as {self.grey}, and {self.colours} are not: all are read as "
                  "colour")
        return wanted or (3 if self.colours else 1)

    def say(self):
        """A line of each kind of image that holds more than one picture of 8 bits."""
        for note, paths in self._noted.items():
            dark = note == DEEP and _all_dark(paths[::max(1, len(paths) // LOOKED_AT)])
            print(f"{len(paths)} images {note}, such as {paths[0]}" + dark * (
                ". Those looked at stay below a sixteenth of that: scale values of 12 bits to 16, or they are dark"))


def _all_dark(paths):
    """Whether images of 16 bits look as if their values had 12. Broken ones do not count."""
    brightest = []
    for path in paths:
        try:
            brightest.append(decode(path).max())
        except BrokenImage:
            continue
    return bool(brightest) and bool(max(brightest) <= DARK)


def refuse_shared(splits, marks):
    """UserError where two of {split: paths} have a file of the same content; equal files have equal marks."""
    for one, two in combinations(splits, 2):
        ours, theirs = (np.frombuffer(marks[split], np.uint64) for split in (one, two))
        shared = np.setdiff1d(np.intersect1d(ours, theirs), [0])  # 0 is that of the broken
        for mark in shared:
            kept = {_digest(splits[one][i]): splits[one][i] for i in np.flatnonzero(ours == mark)}
            for path in (splits[two][i] for i in np.flatnonzero(theirs == mark)):
                if _digest(path) in kept:
                    raise UserError(f"{path} of the {two} split is the same image as {kept[_digest(path)]} of the "
                                    f"{one} split (of {len(shared)} that both seem to hold): remove one of each")


def _digest(path):
    return hashlib.sha256(path.read_bytes()).digest()
