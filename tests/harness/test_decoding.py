"""Pixels and headers of one file, against independent decoders: tifffile, NumPy, and PNG files written by hand."""
import struct
import warnings
import zlib

import numpy as np
import pytest
import skimage
import tifffile
from PIL import Image, ImageOps, features

from harness.decoding import DEEP, FLOATS, FRAMES, BrokenImage, OtherImage, decode, probe

RANDOM = np.random.default_rng(0)
HEIGHT, WIDTH = 12, 20
TURNED = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
          5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
          8: np.rot90}


def pixels(mode="RGB"):
    """Random values of a mode."""
    if mode == "F":
        return RANDOM.random((HEIGHT, WIDTH), dtype=np.float32)
    if mode == "I;16":
        return RANDOM.integers(0, 2 ** 16, (HEIGHT, WIDTH), dtype=np.uint16)
    channels = len(mode) if mode in ("RGB", "RGBA", "LA", "CMYK") else 1
    values = RANDOM.integers(0, 256, (HEIGHT, WIDTH, channels), dtype=np.uint8)
    return values[..., 0] if channels == 1 else values


def picture(mode="RGB"):
    if mode in ("P", "1"):
        return Image.fromarray(pixels("RGB" if mode == "P" else "L")).convert(mode)
    if mode == "CMYK":
        return Image.merge(mode, [picture("L") for _ in mode])
    return Image.fromarray(pixels(mode))


def seen(path):
    """What is decoded, which must be as large as the header says, as colour and, where it is grey, as grey."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        header, colour = probe(path), decode(path)
        assert colour.shape == (*header.size, 3) and colour.dtype == np.uint8
        if header.grey:
            assert np.array_equal(decode(path, channels=1).repeat(3, 2), colour)
        else:
            with pytest.raises(ValueError, match="is a colour image"):
                decode(path, channels=1)
    return colour


def expected(array, top=255.):
    """Colour (H, W, 3) of 0...255 that an array is to be seen as: of `top` or 255 as white, its alpha over white."""
    values = np.atleast_3d(array) * (255 / top)
    if values.shape[2] in (2, 4):
        alpha = values[..., -1:] / 255
        values = values[..., :-1] * alpha + 255 * (1 - alpha)
    return values.repeat(3 // values.shape[2], 2)


def check(path, array, top=255., levels=1):
    error = np.abs(seen(path) - expected(array, top)).max()
    assert error <= levels, error


# --- orientation

FORMATS = {  # suffix and options: modes that it keeps to the bit, or whose pixels Pillow reads the same untagged
    "png": (".png", {}, ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")),
    "jpeg": (".jpg", {}, ("RGB", "L", "CMYK")),
    "webp": (".webp", {"lossless": True, "exact": True}, ("RGB", "RGBA")),
    "tiff": (".tif", {}, ("RGB", "RGBA", "L", "LA", "P", "1", "I;16", "F", "CMYK")),
    "deflated tiff": (".tif", {"compression": "tiff_deflate"}, ("RGB", "RGBA", "L", "LA", "P", "1", "I;16", "F")),
    **({"avif": (".avif", {}, ("RGB", "RGBA"))} if features.check("avif") else {}),
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_turned_by_its_tag_is_read_as_it_is_seen(tmp_path, kind, orientation):
    suffix, options, modes = FORMATS[kind]
    for mode in modes:
        image, exif = picture(mode), Image.Exif()
        image.save(tmp_path / f"plain{suffix}", **options)
        exif[0x0112] = orientation
        image.save(tmp_path / f"turned{suffix}", exif=exif, **options)
        plain = seen(tmp_path / f"plain{suffix}")
        assert plain.shape == (HEIGHT, WIDTH, 3)
        assert np.array_equal(seen(tmp_path / f"turned{suffix}"), TURNED[orientation](plain)), mode


def png(width, depth, colour, data, *chunks, late=()):
    """A PNG written by hand of rows of bytes, with chunks (name, bytes) before its pixels and after them."""
    header = struct.pack(">IIBBBBB", width, len(data), depth, colour, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + bytes(row) for row in data))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in ((b"IHDR", header), *chunks, (b"IDAT", rows[:40]), (b"IDAT", rows[40:]), *late,
                           (b"IEND", b"")))


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes().removeprefix(b"Exif\0\0")


XMP = b"XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta><rdf:Description tiff:Orientation=\"%d\"/></x:xmpmeta>"


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("chunk", [lambda turn: (b"eXIf", exif_of(turn)), lambda turn: (b"iTXt", XMP % turn)])
def test_a_png_may_say_how_it_is_turned_before_or_after_its_pixels(tmp_path, chunk, late):
    array = pixels("L")
    for orientation, turn in TURNED.items():
        chunks = (b"tEXt", b"date:create\0today"), chunk(orientation)
        data = png(WIDTH, 8, 0, array, late=chunks) if late else png(WIDTH, 8, 0, array, *chunks)
        (tmp_path / "a.png").write_bytes(data)
        check(tmp_path / "a.png", turn(array))


BAD_EXIF = (b"", b"\0", b"nonsense", b"II*\0", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff", bytes(64),
            b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\xff\xff\xff\x7f")


@pytest.mark.parametrize("block", BAD_EXIF)
@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg", ".tif"])
def test_a_damaged_exif_block_does_not_break_an_image(tmp_path, suffix, block):
    if suffix == ".png":
        (tmp_path / "a.png").write_bytes(png(WIDTH, 8, 0, pixels("L"), (b"eXIf", block)))
    elif suffix == ".tif":  # a sub-directory of EXIF that leads astray
        tifffile.imwrite(tmp_path / "a.tif", pixels(), extratags=[(34665, "I", 1, 2 ** 31 - len(block), True)])
    else:
        picture().save(tmp_path / f"a{suffix}", **({"exif": block} if block else {}))
    assert seen(tmp_path / f"a{suffix}").shape == (HEIGHT, WIDTH, 3)


# --- transparency

def keyed(colour, depth, key, values):
    """A PNG of grey (0) or RGB (2) samples of some bits, one of whose colours is transparent."""
    count = {0: 1, 2: 3}[colour]
    bits = np.unpackbits(values.astype(">u2").view(np.uint8).reshape(len(values), -1, 2), axis=2)[..., 16 - depth:]
    rows = np.packbits(bits.reshape(len(values), -1), axis=1)
    return png(values.shape[1] // count, depth, colour, rows, (b"tRNS", struct.pack(f">{count}H", *key)))


@pytest.mark.parametrize("colour, depth", [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16)])
def test_the_transparent_colour_of_a_png_is_white(tmp_path, colour, depth):
    top = 2 ** depth - 1
    count = 3 if colour == 2 else 1
    values = RANDOM.integers(0, top + 1, (HEIGHT, WIDTH, count))
    values[3, 5] = key = values[7, 9]
    (tmp_path / "a.png").write_bytes(keyed(colour, depth, key, values.reshape(HEIGHT, -1)))
    values[(values == key).all(2)] = top
    check(tmp_path / "a.png", values, top)


TRANSPARENT = {"RGBA": (".png", ".webp", ".tif"), "LA": (".png", ".tif")}


@pytest.mark.parametrize("mode, suffix", [(mode, suffix) for mode, ends in TRANSPARENT.items() for suffix in ends])
def test_an_alpha_channel_blends_onto_white(tmp_path, mode, suffix):
    array = pixels(mode)
    array[2:6, ..., -1], array[6:9, ..., -1] = 0, 255
    options = {"lossless": True, "exact": True} if suffix == ".webp" else {}
    Image.fromarray(array).save(tmp_path / f"a{suffix}", **options)
    check(tmp_path / f"a{suffix}", array)


@pytest.mark.parametrize("colour, channels", [(4, 2), (6, 4)])
def test_an_alpha_channel_of_sixteen_bits_blends_onto_white(tmp_path, colour, channels):
    values = RANDOM.integers(0, 2 ** 16, (HEIGHT, WIDTH, channels), dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(png(WIDTH, 16, colour, values.astype(">u2").view(np.uint8).reshape(HEIGHT, -1)))
    check(tmp_path / "a.png", values / 257, levels=2)  # a level for the colour, and one for alpha


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("suffix", [".png", ".gif"])
@pytest.mark.parametrize("alphas", [None, 5, bytes(range(256))])
def test_a_palette_is_read_by_its_colours_and_blends_onto_white(tmp_path, grey, suffix, alphas):
    table = RANDOM.integers(0, 256, (256, 1 if grey else 3), dtype=np.uint8).repeat(3 if grey else 1, 1)
    index, alpha = pixels("L"), np.full(256, 255)
    index[:, :3] = 5
    if alphas == 5:
        alpha[5], table[5] = 0, (255, 0, 255)  # a colour that nobody sees does not make an image one of colour
    elif alphas:
        if suffix == ".gif":
            return  # has one transparent entry
        alpha = np.array(list(alphas))
    image = Image.fromarray(index)
    image.putpalette(table.tobytes())
    image.save(tmp_path / f"a{suffix}", **({} if alphas is None else {"transparency": alphas}))
    check(tmp_path / f"a{suffix}", np.concatenate([table, alpha[:, None]], 1)[index])
    assert probe(tmp_path / f"a{suffix}").grey == grey


# --- TIFF of every kind, each as tifffile reads it or refused by name

KINDS = [("minisblack", 1, ()), ("miniswhite", 1, ()), ("minisblack", 2, ("unassalpha",)), ("rgb", 3, ()),
         ("minisblack", 2, ("assocalpha",)), ("rgb", 4, ("unassalpha",)), ("rgb", 4, ("assocalpha",))]


def samples(dtype, channels, associated):
    shape = (HEIGHT, WIDTH, channels)
    if np.dtype(dtype).kind == "f":
        values, top = RANDOM.random(shape).astype(dtype), 1
    else:
        top = np.iinfo(dtype).max
        values = RANDOM.integers(0, top, shape, dtype=dtype, endpoint=True)
    if associated:  # colours that are multiplied by alpha already
        values[..., :-1] = values[..., :-1] * (values[..., -1:] / top)
    return values, top


@pytest.mark.parametrize("dtype", ["bool", "u1", "u2", "u4", "i1", "i2", "i4", "f2", "f4", "f8"])
@pytest.mark.parametrize("order", "<>")
def test_tiff_is_read_as_tifffile_reads_it_or_refused(tmp_path, dtype, order):
    path, right = tmp_path / "a.tif", set()
    for kind, channels, extra in KINDS:
        for planar in ("contig", "separate") if channels > 1 else (None,):
            for compression in (None, "zlib"):
                if dtype == "bool" and channels > 1:
                    continue
                values, top = samples("u1" if dtype == "bool" else dtype, channels, "assocalpha" in extra)
                values, top = (values > 127, 1) if dtype == "bool" else (values, top)
                data = np.moveaxis(values, 2, 0) if planar == "separate" else values.squeeze()
                tifffile.imwrite(path, data, photometric=kind, planarconfig=planar, compression=compression,
                                 extrasamples=extra, byteorder=order, metadata=None)
                written = tifffile.imread(path)
                written = np.moveaxis(written, 0, 2) if planar == "separate" else written
                scaled = np.atleast_3d(written) * (255. / top)
                if extra == ("assocalpha",):
                    want = scaled[..., :-1] + 255 - scaled[..., -1:]
                else:
                    want = 255 - scaled if kind == "miniswhite" else expected(scaled)
                try:
                    image = seen(path)
                except (BrokenImage, OtherImage) as refused:
                    assert str(path) in str(refused)
                else:
                    error = np.abs(image - want).max()
                    levels = 2 if extra and dtype == "u2" else 1  # a level for the colour, and one for alpha
                    assert error <= levels, (kind, channels, planar, compression, error)
                    right.add((kind, channels))
    least = {"bool": {(kind, 1) for kind in ("minisblack", "miniswhite")}, "u1": {kind[:2] for kind in KINDS},
             "u2": {("minisblack", 1), ("rgb", 3), ("rgb", 4)}, "f4": {("minisblack", 1), ("miniswhite", 1)}}
    assert right >= least.get(dtype, set()), right


# --- what a line says of

@pytest.mark.parametrize("suffix, notes", [(".gif", (FRAMES,)), (".png", (FRAMES,)), (".webp", (FRAMES,)),
                                           (".tif", (FRAMES,)), (".mpo", (FRAMES,))])
def test_of_several_pictures_the_first_is_read_and_said(tmp_path, suffix, notes):
    path, frames = tmp_path / f"a{suffix}", [Image.new("RGB", (8, 4), (value, 0, 0)) for value in (200, 100, 0)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    if Image.open(path).format == "JPEG":
        pytest.skip("this version of Pillow writes no MPO")
    assert probe(path).notes == notes
    assert np.abs(decode(path).astype(int) - (200, 0, 0)).max() <= 3
    frames[0].save(path)
    assert probe(path).notes == ()


@pytest.mark.parametrize("name, array, notes", [
    ("a.png", pixels("I;16"), (DEEP,)), ("a.tif", pixels("I;16"), (DEEP,)), ("b.tif", pixels("F"), (FLOATS,)),
    ("b.png", pixels(), ()), ("c.png", pixels("LA"), ())])
def test_more_than_eight_bits_are_said(tmp_path, name, array, notes):
    Image.fromarray(array).save(tmp_path / name)
    assert probe(tmp_path / name).notes == notes


def test_colour_of_sixteen_bits_is_said(tmp_path):
    values = RANDOM.integers(0, 2 ** 16, (HEIGHT, WIDTH, 3), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", values)
    (tmp_path / "a.png").write_bytes(png(WIDTH, 16, 2, values.astype(">u2").view(np.uint8).reshape(HEIGHT, -1)))
    for path in (tmp_path / "a.tif", tmp_path / "a.png"):
        check(path, values, 65535)
        assert probe(path).notes == (DEEP,)


def test_twelve_bits_packed_have_a_white_of_their_own(tmp_path):
    """TIFF of 12 bits a value, written by hand: two values in three bytes."""
    values = RANDOM.integers(0, 4096, (HEIGHT, WIDTH), dtype=np.uint16)
    bits = np.unpackbits(values.astype(">u2").view(np.uint8).reshape(HEIGHT, WIDTH, 2), axis=2)[..., 4:]
    data = np.packbits(bits.reshape(HEIGHT, -1), axis=1).tobytes()
    tags = ((256, WIDTH), (257, HEIGHT), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, HEIGHT),
            (279, len(data)))
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0)
                                                        for tag, value in tags) + bytes(4)
    (tmp_path / "a.tif").write_bytes(b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory)
    check(tmp_path / "a.tif", values, 4095)
    assert probe(tmp_path / "a.tif").notes == ()


def test_equal_files_have_equal_marks_and_others_not(tmp_path):
    for name in "abc":
        picture().save(tmp_path / f"{name}.png")
    (tmp_path / "d.jpg").write_bytes((tmp_path / "a.png").read_bytes())
    marks = [probe(tmp_path / name).mark for name in ("a.png", "b.png", "c.png", "d.jpg")]
    assert marks[0] == marks[3] and len(set(marks)) == 3


def test_colours_that_cannot_be_converted_are_refused_by_name(tmp_path):
    Image.merge("LAB", [picture("L") for _ in "LAB"]).save(tmp_path / "a.tif")
    with pytest.raises(OtherImage, match="a.tif has colours in LAB: convert it"):
        probe(tmp_path / "a.tif")


def test_heic_is_read_where_its_package_is_installed(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.new("RGB", (WIDTH, HEIGHT), (200, 30, 60))).save(tmp_path / "a.heic")
    assert np.abs(seen(tmp_path / "a.heic").astype(int) - (200, 30, 60)).max() < 8


def test_heic_names_its_package_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.decoding.UNREAD", {".heic"})
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(OtherImage, match="a.heic is not read: pip install pillow-heif"):
        probe(tmp_path / "a.heic")


# --- a JPEG far larger than it is wanted

def fitted(path, side):
    """A square picture as Pillow decodes it in full and resizes it."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    return np.asarray(upright.resize((side, side), Image.Resampling.LANCZOS), dtype=int)


@pytest.mark.parametrize("side, wanted, differs", [
    (1408, 32, True), (1408, 100, True), (512, 64, True), (512, 86, False), (511, 32, False), (64, 100, False)])
def test_a_large_jpeg_is_decoded_smaller_and_hardly_differs(tmp_path, side, wanted, differs):
    image = Image.fromarray(skimage.data.retina() if side > 512 else skimage.data.astronaut()).crop((0, 0, side, side))
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, how in (("a.jpg", {}), ("turned.jpg", {"exif": exif}), ("a.png", {})):
        image.save(tmp_path / name, quality=90, **how)
        error = np.abs(decode(tmp_path / name, (wanted, wanted)) - fitted(tmp_path / name, wanted))
        assert error.max() <= 8 and error.mean() < 0.5
        assert error.any() == (differs and name != "a.png")


@pytest.mark.parametrize("kept", [0.5, 0.98])
def test_a_large_jpeg_that_is_cut_short_is_broken(tmp_path, kept):
    Image.fromarray(skimage.data.astronaut()).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[:int(kept * len(data))])
    with pytest.raises(BrokenImage):
        decode(tmp_path / "a.jpg", (32, 32))
