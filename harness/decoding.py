"""One image file: what its header says, and its pixels as 8-bit grey or colour.

Pixels are turned as EXIF, XMP or TIFF say, and what is transparent is blended onto white.
"""
import os
import re
import warnings
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from harness.errors import UserError

try:
    import pillow_heif
except ImportError:
    UNREAD = {".heic", ".heif", ".hif"}  # endings of images that need the package
else:
    pillow_heif.register_heif_opener()
    UNREAD = set()
HEIC_NEEDS = "pip install pillow-heif to read HEIC"

Image.preinit()  # so that it tries the usual formats first
# Formats that Pillow knows but does not decode, or draws with another program.
NO_PIXELS = {"PDF", "EPS", "WMF", "MPEG", "HDF5", "BUFR", "GRIB", "PALM"}
SIXTEEN_BITS = {"PNG", "PPM", "JPEG2000"}  # formats whose mode I is 16 bits a value
ORIENTATION, SIDEWAYS = 274, (5, 6, 7, 8)  # the tag, and those of its values that swap height and width
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}
TURNS_LATE = re.compile(rb"....(eXIf|[tzi][ET]Xt(Raw profile type exif|XML:com\.adobe\.xmp))", re.DOTALL)  # PNG chunks
# Tags of TIFF.
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, PLANAR, EXTRA, SAMPLE_FORMAT = 256, 257, 258, 259, 262, 284, 338, 339
SPARE = 3  # times the size that is wanted: a JPEG is decoded no smaller than so, and then resized
PART = 256  # bytes in the middle and at the end of a file, which tell it from most others

# What is read of files that hold more than one picture of 8 bits.
FRAMES = "hold several pictures or frames: the first is read"
DEEP = "have 16 bits a value: 0 is read as black, 65535 as white"
FLOATS = "hold floats: 0 is read as black, 1 as white"


class BrokenImage(UserError):
    """An image file that does not decode."""


class OtherImage(UserError):
    """An image file that is whole, but of a kind of which it is not sure that it is read as it is meant."""


class Header(NamedTuple):
    """What an image file is, known without decoding its pixels."""
    size: tuple  # (H, W), as it is seen
    grey: bool
    notes: tuple  # those of FRAMES, DEEP and FLOATS that hold
    mark: int  # files of equal content have equal ones


def is_image(name):
    """Whether the ending of a file's name is that of a format with pixels."""
    return Image.registered_extensions().get(os.path.splitext(name)[1].lower(), "PDF") not in NO_PIXELS


def probe(path):
    """`Header` of an image file. BrokenImage where it has none, OtherImage where it would not be read as meant."""
    with _opened(path) as (file, image):
        if image.format == "PNG" and _turns_late(file):
            image.load()
        _refuse(path, image)
        return Header(_size(image), _is_grey(image), tuple(_notes(image)), _mark(file))


def decode(path, size=None, channels=3, resize=True):
    """Read an image file as an array (H, W, C) uint8, resized to cover and center-cropped to size (H, W) if given.

    Values of 16 bits, and floats in [0, 1], are scaled to 8 bits. A JPEG many times larger is decoded smaller at once.

    Raises:
        BrokenImage: it does not decode. OtherImage: its range is not known. UserError: it is colour where channels is
            1, or its size differs where `resize` is not set.
    """
    with _opened(path) as (_, image):
        _refuse(path, image)
        grey, white, negative = _is_grey(image), _white(image), _is_negative(image)
        _scale_key(image)
        if size and resize:
            _shrink(image, SPARE * max(size))
        image.load()
        turn = TURNS.get(_orientation(image))
    if channels == 1 and not grey:
        raise UserError(f"{path} is a colour image among greyscale ones: keep one kind in a folder")
    if white:
        image = _eight_bits(path, image, white, negative)
    image = _on_white(image).convert("L" if channels == 1 else "RGB")
    if turn is not None:
        image = image.transpose(turn)
    if size and image.size != (size[1], size[0]):
        if not resize:
            raise UserError(f"{path} is {image.height}x{image.width} but others are {size[0]}x{size[1]}: pass "
                            "--image-size to bring all images to one size")
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
    return np.array(image).reshape(image.height, image.width, channels)


@contextmanager
def _opened(path):
    """An image file and what Pillow makes of it; all that goes wrong is a BrokenImage: decoders raise every error."""
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")  # of large images and odd metadata: they decode or they do not
            with Image.open(file) as image:
                yield file, image
    except (OtherImage, MemoryError):
        raise
    except Exception as error:
        if Path(path).suffix.lower() in UNREAD:
            raise OtherImage(f"{path} is not read: {HEIC_NEEDS}") from error
        reason = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
        raise BrokenImage(f"{path} does not decode as an image{reason}: repair or remove it, or pass --skip-broken"
                          ) from error


# --- the header

def _mark(file):
    """The length of a file and a checksum of parts of it, in 64 bits."""
    number, length = file.fileno(), os.fstat(file.fileno()).st_size
    parts = os.pread(number, PART, length // 2) + os.pread(number, PART, max(0, length - PART))
    return (length << 32 | zlib.crc32(parts)) % 2 ** 64


def _turns_late(file):
    """Whether a PNG says after its pixels how it is turned, so that Pillow knows once it has decoded them."""
    place, seen_pixels = 8, False
    while len(chunk := os.pread(file.fileno(), 40, place)) > 8:
        if seen_pixels and TURNS_LATE.match(chunk):
            return True
        seen_pixels |= chunk[4:8] == b"IDAT"
        place += 12 + int.from_bytes(chunk[:4], "big")
    return False


def _orientation(image):
    """The EXIF orientation that is still to be applied, None where there is none or its block is damaged."""
    if image.format == "TIFF":  # Pillow turns these itself
        return None
    try:
        return Image.Image.getexif(image).get(ORIENTATION)  # PNG's own getexif would decode the pixels
    except Exception:
        return None


def _size(image):
    """(H, W) as an image is seen."""
    (width, height), orientation = image.size, _orientation(image)
    if image.format == "TIFF":  # some versions of Pillow have turned the size already, others not
        width, height, orientation = (image.tag_v2.get(tag) for tag in (WIDTH, HEIGHT, ORIENTATION))
    return (width, height) if orientation in SIDEWAYS else (height, width)


def _refuse(path, image):
    """OtherImage for kinds that Pillow opens and decodes to other values than were written."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    if image.mode in ("LAB", "HSV"):
        what = f"colours in {image.mode}"
    elif image.mode == "I" and image.format not in SIXTEEN_BITS and tags.get(BITS) != (16,):
        what = "32-bit integers, whose range is not known"
    elif 2 in tags.get(SAMPLE_FORMAT, ()):
        what = "signed integers, whose range is not known"
    elif tags.get(PLANAR) == 2 and (image.mode not in ("RGB", "RGBA", "CMYK") or set(tags.get(BITS, ())) != {8}):
        what = "channels in separate planes that are not RGB of 8 bits each"
    elif tags.get(EXTRA) == (1,) and 16 in tags.get(BITS, ()):
        what = "colours of 16 bits that are multiplied by their alpha"
    elif image.mode == "F" and tags.get(COMPRESSION, 1) != 1 and tags.prefix == b"MM":
        what = "compressed floats in big-endian order"
    else:
        return
    raise OtherImage(f"{path} has {what}: convert it to 8 or 16 bits, say to PNG")


def _is_grey(image):
    """Whether all colours of an image are grey for certain; those of a palette are looked at, pixels are not."""
    if image.mode not in ("P", "PA"):
        return image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")
    entries = Image.frombytes("P", (256, 1), bytes(range(256)))
    entries.putpalette(image.palette)
    if "transparency" in image.info:
        entries.info["transparency"] = image.info["transparency"]
    red, green, blue = np.moveaxis(np.asarray(_on_white(entries).convert("RGB")), 2, 0)
    return bool((red == green).all() and (green == blue).all())


def _white(image):
    """The value that is white where an image has not 8 bits a value, else None."""
    if image.mode == "F":
        return 1
    if image.mode.startswith("I"):
        return 2 ** 12 - 1 if image.format == "TIFF" and image.tag_v2.get(BITS) == (12,) else 2 ** 16 - 1
    return None


def _is_negative(image):
    """Whether 0 is white in a TIFF of more than 8 bits; Pillow turns the others itself."""
    return image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == 0


def _notes(image):
    if getattr(image, "is_animated", False) and image.format != "PSD":  # whose layers make up one picture
        yield FRAMES
    if _white(image) == 1:
        yield FLOATS
    elif _white(image) == 2 ** 16 - 1 or ";16" in str(image.tile):
        yield DEEP


# --- the pixels

def _shrink(image, least):
    """Let a JPEG decode at an eighth, a quarter or half of its sides: the largest step that leaves `least` pixels each.

    Only where the sides divide by it, so that no part of a pixel is added at the edge. A photograph of 4000x3000 takes
    a seventh of the time, and once resized differs by 0.4 levels at most on average, by up to 8 at single pixels.
    """
    for step in (8, 4, 2):
        if all(side % step == 0 and side // step >= least for side in image.size):
            image.draft(None, [side // step for side in image.size])  # other formats have no draft
            return


def _scale_key(image):
    """Bring a PNG's transparent colour, which has the bits of the file, to the 8 bits that Pillow gives pixels."""
    key, raw = image.info.get("transparency"), str(image.tile)
    if image.format != "PNG" or key is None:
        return
    if "RGB;16" in raw:
        image.info["transparency"] = tuple(value >> 8 for value in key)
    for bits, step in (("L;2", 85), ("L;4", 17)):
        if bits in raw:
            image.info["transparency"] = key * step


def _eight_bits(path, image, white, negative):
    """What Pillow would clip, scaled: 16 bits a value, and floats in [0, 1]; a value that is transparent is white."""
    values = np.asarray(image, dtype=np.float64)
    if not (values.min() >= 0 and values.max() <= white):
        raise OtherImage(f"{path} has values from {values.min():.4g} to {values.max():.4g}, whose range is not known: "
                         f"scale them to 0...{white}, or convert it to 8 bits")
    scaled = (white - values if negative else values) * (255 / white)
    return Image.fromarray(np.where(values == image.info.get("transparency"), 255, scaled).round().astype(np.uint8))


def _on_white(image):
    """An image blended onto white where it is transparent, by an alpha channel, a palette or a colour."""
    if not image.has_transparency_data:
        return image
    seen = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
