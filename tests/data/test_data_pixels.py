"""What the pixels of a file mean: more than 8 bits, alpha, EXIF's rotation; in folders and prepared sets alike."""

import io
import struct
import zlib

import generated
import numpy as np
import pytest
from PIL import Image

import data
from data.source import EncodedImage

RAMP = np.tile(np.linspace(0, 1, 64), (4, 1))
EIGHT_BITS = np.rint(RAMP * 255).astype(np.uint8)


def packed(array, kind, **options):
    buffer = io.BytesIO()
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(content, mode="L", **reading):
    array = np.asarray(EncodedImage(content, "a picture", mode, data.Reading(**reading)))
    return array[..., 0] if mode == "L" else array


def refusal(content, **reading):
    with pytest.raises(data.ExampleError, match="a picture") as caught:
        decoded(content, **reading)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pgm(values, white):
    return b"P5\n%d %d\n%d\n" % (*values.shape[::-1], white) + values.astype(">u2").tobytes()


def tiff(values, bits=16, white_is_zero=False):
    """A grey or colour TIFF of unsigned integers, without compression; 12 bits are packed."""
    samples = values.shape[2] if values.ndim == 3 else 1
    if bits == 12:
        pairs = values.reshape(-1, 2).astype(np.uint32)
        joined = pairs[:, 0] << 12 | pairs[:, 1]
        strip = np.stack([joined >> 16, joined >> 8 & 255, joined & 255], axis=-1).astype(np.uint8).tobytes()
    else:
        strip = values.astype("<u2").tobytes()
    per_sample = (3, 1, bits) if samples == 1 else (3, samples, 190)
    photometric = 2 if samples == 3 else 0 if white_is_zero else 1
    entries = {
        256: (3, 1, values.shape[1]),
        257: (3, 1, values.shape[0]),
        258: per_sample,
        259: (3, 1, 1),
        262: (3, 1, photometric),
        273: (4, 1, 200),
        277: (3, 1, samples),
        278: (4, 1, values.shape[0]),
        279: (4, 1, len(strip)),
    }
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    head += b"".join(struct.pack("<HHII", tag, *entry) for tag, entry in entries.items()) + bytes(4)
    return head.ljust(190, b"\0") + struct.pack("<3H", bits, bits, bits) + bytes(4) + strip


def png16(values):
    """A PNG of 16 bits a channel in colour, which Pillow reads and does not write."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = b"".join(b"\0" + row.tobytes() for row in values.astype(">u2"))
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


SIXTEEN = np.rint(RAMP * 65535).astype(np.uint16)
TWELVE = np.rint(RAMP * 4095).astype(np.uint16)


@pytest.mark.parametrize(
    "content",
    [
        packed(SIXTEEN, "PNG"),
        packed(SIXTEEN, "TIFF"),
        packed(SIXTEEN.astype(np.int32), "TIFF"),
        packed(RAMP.astype(np.float32), "TIFF"),
        pgm(SIXTEEN, 65535),
        pgm(TWELVE, 4095),
        tiff(TWELVE, bits=12),
        tiff(65535 - SIXTEEN, white_is_zero=True),
    ],
    ids=["png16", "tiff16", "int32", "float01", "pgm16", "pgm12", "tiff12", "white is zero"],
)
def test_more_than_eight_bits_keep_their_meaning(content):
    found = decoded(content).astype(int)
    assert np.abs(found - EIGHT_BITS).max() <= 1  # 12 bits have no value for some of 8
    assert found.mean() == pytest.approx(127.5, abs=0.2)
    assert np.array_equal(decoded(content, "RGB"), np.repeat(found[..., None], 3, axis=-1))


@pytest.mark.parametrize(
    ("content", "pixel_range", "named"),
    [
        (packed(TWELVE, "PNG"), (0, 4095), ("I;16", "0 to 4095", "0,4095")),
        (packed(np.rint(RAMP * 9000).astype(np.uint16), "TIFF"), ("0", "9000"), ("I;16", "0,16383")),
        (packed((RAMP * 255).astype(np.float32), "TIFF"), (0, 255), ("mode F", "0 to 255", "0,255")),
        (packed((RAMP * 3000 - 1000).astype(np.float32), "TIFF"), (-1000, 2000), ("mode F", "-1000 to 2000")),
        (packed(np.rint(RAMP * 10**6).astype(np.int32), "TIFF"), (0, 1e6), ("mode I", "0 to 1e+06")),
        (packed(np.rint(RAMP * 4000 - 1000).astype(np.int32), "TIFF"), (-1000, 3000), ("mode I", "-1000 to 3000")),
    ],
    ids=["12 in 16", "14 in 16", "float255", "float below 0", "int32", "int32 below 0"],
)
def test_a_range_that_is_not_known_is_refused_until_it_is_set(content, pixel_range, named):
    message = refusal(content)
    for part in (*named, "data.pixel_range"):
        assert part in message
    assert np.abs(decoded(content, pixel_range=pixel_range).astype(int) - EIGHT_BITS).max() <= 1


def test_values_outside_of_a_given_range_are_clipped_and_black_is_black():
    low = decoded(packed(SIXTEEN, "PNG"), pixel_range=(16384, 49151))
    assert (low[0, 0], low[0, -1]) == (0, 255)
    assert low[0, 32] == 132  # 33288 is 51.6% of the way
    assert decoded(packed(np.zeros((2, 2), np.uint16), "PNG")).max() == 0
    # PGM says what its white is, and Pillow has stretched it to 16 bits already.
    assert np.abs(decoded(pgm(TWELVE, 4095), pixel_range=(0, 4095)).astype(int) - EIGHT_BITS).max() <= 1
    broken = RAMP.astype(np.float32)
    broken[0, 0] = np.nan
    assert "NaN" in refusal(packed(broken, "TIFF"), pixel_range=(0, 1))


@pytest.mark.parametrize("write", [png16, tiff])
def test_sixteen_bits_in_colour(write):
    colours = np.stack([SIXTEEN, SIXTEEN[:, ::-1], SIXTEEN // 2], axis=-1)
    assert np.abs(decoded(write(colours), "RGB").astype(int) - colours / 257).max() <= 1
    dark = write(colours // 16)
    assert "no value above 4095" in refusal(dark)
    assert "data.pixel_range=0,4095 is for grey" in refusal(dark, pixel_range=(0, 4095))
    assert decoded(dark, "RGB", pixel_range=(0, 65535)).max() == 15


@pytest.mark.parametrize("wrong", [(0,), (1, 0), (0, "white"), (0, np.inf), 4095])
def test_an_impossible_range_is_refused(wrong):
    with pytest.raises(ValueError, match=r"data\.pixel_range must be black,white such as 0,4095, got"):
        data.Reading(pixel_range=wrong)


def test_alpha_is_dropped_put_on_a_ground_or_refused():
    alpha = np.array([[0, 255, 51]], np.uint8)
    colour = np.array([[[200, 100, 50]] * 3], np.uint8)
    rgba = packed(np.dstack([colour, alpha]), "PNG")
    grey = packed(np.dstack([colour[..., 0], alpha]), "PNG")
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([200, 100, 50] * 2)
    palette = packed(palette, "PNG", transparency=bytes([0, 255]))
    for content in (rgba, palette):
        assert np.array_equal(np.unique(decoded(content, "RGB").reshape(-1, 3), axis=0), [[200, 100, 50]])
        assert decoded(content, "RGB", alpha="black")[0, :2].tolist() == [[0, 0, 0], [200, 100, 50]]
        assert decoded(content, "RGB", alpha="white")[0, :2].tolist() == [[255, 255, 255], [200, 100, 50]]
        assert "data.alpha=refuse" in refusal(content, alpha="refuse")
    assert decoded(rgba, "RGB", alpha="black")[0, 2].tolist() == [40, 20, 10]
    assert decoded(grey, alpha="white")[0].tolist() == [255, 200, 244]
    assert decoded(packed(EIGHT_BITS, "PNG"), alpha="refuse").shape == EIGHT_BITS.shape
    with pytest.raises(ValueError, match=r"unknown data\.alpha 'blak'; nearest: 'black'"):
        data.Reading(alpha="blak")


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_rotation_is_an_option(kind, turn):
    """Against the table of the standard: where the first row and the first column of the stored image belong."""
    rows, columns = np.mgrid[0:32, 0:64]
    stored = np.dstack([rows * 6, columns * 3, rows * 0]).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = turn
    content = packed(stored, kind, exif=exif, **({"quality": 100, "subsampling": 0} if kind == "JPEG" else {}))
    assert np.abs(decoded(content, "RGB").astype(int) - stored).max() <= 6
    image = EncodedImage(content, "a picture", "RGB", data.Reading(exif_rotation=True))
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: stored[::-1].transpose(1, 0, 2),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: stored[:, ::-1].transpose(1, 0, 2),
    }[turn]
    assert image.size == upright.shape[1::-1]
    assert np.abs(np.asarray(image).astype(int) - upright).max() <= 6
    # The size that a reduced JPEG must have is that of the image as it is seen.
    half = (upright.shape[1] // 2, upright.shape[0] // 2)
    assert image.decode(half).size == (half if kind == "JPEG" else upright.shape[1::-1])


def test_a_tiff_is_turned_once():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = packed(SIXTEEN, "TIFF", exif=exif)
    for option in (False, True):
        image = EncodedImage(content, "a picture", "L", data.Reading(exif_rotation=option))
        assert image.size == (4, 64)
        assert np.array_equal(np.asarray(image)[..., 0], EIGHT_BITS[::-1].T)


def test_folders_and_predictions_are_read_alike(tmp_path):
    for place in ("train/a", "val/a"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "0.png").write_bytes(packed(TWELVE, "PNG"))
    for name, split in ((f"folder:{tmp_path}", "train"), (f"images:{tmp_path}", "all")):
        for cache in ("none", "memory"):
            reading = data.Reading(pixel_range=(0, 4095))
            source = data.open_source(name, split, cache=cache, reading=reading)
            assert np.abs(np.asarray(source[0]["image"])[..., 0].astype(int) - EIGHT_BITS).max() <= 1
            assert source.describe(0).endswith("0.png")
        stream = data.eval_batches(data.open_source(name, split), transforms="normalize", batch_size=1)
        with stream, pytest.raises(data.ExampleError, match=r"0\.png: mode I;16.*data\.pixel_range"):
            next(stream)


def test_arrays_of_a_source_are_checked_and_scaled():
    def source(values):
        return data.ArraySource({"image": values}, fields={"image": "image"})

    def first(source):
        with data.eval_batches(source, transforms="value_range(0, 1)", batch_size=1) as batches:
            return next(batches)["image"][0, ..., 0]

    assert np.allclose(first(source(RAMP[None, ..., None].astype(np.float32))), RAMP)
    for values in (SIXTEEN, TWELVE.astype(np.int32), (RAMP * 255).astype(np.float32), (RAMP - 0.5).astype(np.float32)):
        with pytest.raises(data.ExampleError, match=rf"'image' of example 0 .* is {values.dtype} .*data\.pixel_range"):
            first(source(values[None, ..., None]))
    data.register_source("twelve", lambda argument, split, directory=None: source(TWELVE[None, ..., None]))
    read = data.open_source("twelve", "train", cache="none", reading=data.Reading(pixel_range=(0, 4095)))
    assert np.allclose(first(read), RAMP, atol=1e-3)


def test_prepared_sets_of_any_depth(tmp_path, monkeypatch):
    """TFDS keeps floats as the four bytes of a PNG's channels; masks are classes, whatever their depth."""
    import tensorflow_datasets as tfds

    # TFDS encodes floats with TensorFlow alone.
    monkeypatch.setattr(tfds.core.features.image_feature._FloatImageEncoder, "encode_image_or_path", lambda _, x: x)
    image = tfds.features.Image
    features = {
        "image": image(shape=(None, None, 1), dtype=np.uint16, encoding_format="png"),
        "float": image(shape=(None, None, 1), dtype=np.float32, encoding_format="png"),
        "colour": image(shape=(None, None, 3), dtype=np.uint16, encoding_format="png"),
        "mask": tfds.features.LabeledImage(labels=5000, shape=(None, None, 1), dtype=np.uint16, encoding_format="png"),
    }
    four = np.ascontiguousarray(RAMP.astype(np.float32)).view(np.uint8).reshape(*RAMP.shape, 4)
    example = {
        "image": packed(SIXTEEN, "PNG"),
        "float": packed(four, "PNG"),
        "colour": png16(np.stack([SIXTEEN] * 3, axis=-1)),
        "mask": packed(TWELVE, "PNG"),
    }
    generated.write(tmp_path, "deep", "1.0.0", features, {"train": [example]})
    source = data.open_source("deep", "train", str(tmp_path))
    with data.eval_batches(source, transforms="value_range(0, 1)", batch_size=1) as batches:
        batch = next(batches)
    for name in ("image", "float", "colour"):
        assert batch[name].dtype == np.float32
        assert np.abs(batch[name][0, ..., 0] - RAMP).max() < 1 / 250, name
    assert batch["colour"].shape == (1, 4, 64, 3)
    assert np.array_equal(batch["mask"][0], TWELVE)
