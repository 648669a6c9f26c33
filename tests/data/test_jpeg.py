"""JPEGs with oddities: those that lose no pixel equal Pillow's pixels, those that lose one are refused."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from clipjax.data.images import decode
from clipjax.data.jpeg import harmless_copies
from clipjax.data.sample import BadSample

pytestmark = pytest.mark.newest

EOI = b"\xff\xd9"


def picture(channels: int = 3) -> Image.Image:
    coarse = np.random.default_rng(channels).integers(0, 256, (6, 8, channels), dtype=np.uint8)
    planes = [Image.fromarray(coarse[..., i]).resize((80, 60), Image.Resampling.BILINEAR) for i in range(channels)]
    return Image.merge({3: "RGB", 4: "CMYK"}[channels], planes)


def jpeg(image: Image.Image | None = None, **options) -> bytes:
    stream = io.BytesIO()
    (image or picture()).save(stream, "JPEG", quality=90, **options)
    return stream.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def read(data: bytes) -> np.ndarray | str:
    try:
        return decode(data, max_pixels=4800)
    except BadSample as bad:
        return bad.reason


def segment(code: int, body: bytes) -> bytes:
    return bytes([0xFF, code]) + struct.pack(">H", len(body) + 2) + body


def with_scan_numbers(data: bytes, numbers: bytes) -> bytes:
    """Replace first and last coefficient and the bits of the first scan."""
    start = data.index(b"\xff\xda")
    end = start + 2 + struct.unpack(">H", data[start + 2 : start + 4])[0]
    return data[: end - 3] + numbers + data[end:]


def before(data: bytes, marker: bytes, stray: bytes) -> bytes:
    at = data.index(marker)
    return data[:at] + stray + data[at:]


BASELINE, PROGRESSIVE = jpeg(), jpeg(progressive=True)
RESTARTS = jpeg(restart_marker_blocks=4)
RGB_COLOURS = jpeg(keep_rgb=True)  # has an Adobe marker with transform 0
CUT_PROFILE = segment(0xE2, b"ICC_PROFILE\0\5\2" + bytes(10))
HARMLESS = {
    "scan header ends at 0": (BASELINE, with_scan_numbers(BASELINE, b"\0\0\0")),
    "scan header of a progressive one": (BASELINE, with_scan_numbers(BASELINE, b"\1\5\x21")),
    "version 9 of JFIF": (BASELINE, BASELINE.replace(b"JFIF\0\1", b"JFIF\0\x09")),
    "cut colour profile": (BASELINE, BASELINE[:2] + CUT_PROFILE + BASELINE[2:]),
    "a byte before a table": (BASELINE, before(BASELINE, b"\xff\xdb", b"\x17")),
    "zeros before a table": (BASELINE, before(BASELINE, b"\xff\xdb", bytes(500))),
    "zeros before the end": (BASELINE, BASELINE[:-2] + bytes(500) + EOI),
    "zeros before the end, progressive": (PROGRESSIVE, PROGRESSIVE[:-2] + bytes(500) + EOI),
    "fill bytes": (BASELINE, BASELINE[:-2] + b"\xff" * 50 + EOI),
    "no end": (BASELINE, BASELINE[:-2]),
    "half an end": (BASELINE, BASELINE[:-1]),
    "no end, progressive": (PROGRESSIVE, PROGRESSIVE[:-2]),
    "no end, restarts": (RESTARTS, RESTARTS[:-2]),
    "rubbish behind the end": (BASELINE, BASELINE + bytes(range(256)) * 9),
    "another picture behind the end": (BASELINE, BASELINE + jpeg(Image.new("RGB", (9, 9)))),
    "several at once": (
        BASELINE,
        with_scan_numbers(before(BASELINE.replace(b"JFIF\0\1", b"JFIF\0\2"), b"\xff\xdb", b"\0"), b"\0\0\0")[:-2],
    ),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_oddities_keep_every_pixel(name):
    plain, odd = HARMLESS[name]
    np.testing.assert_array_equal(read(odd), by_pillow(plain))


WITH_END = [name for name, (_, odd) in HARMLESS.items() if EOI in odd]


@pytest.mark.parametrize("name", WITH_END)
def test_pillow_sees_the_same_in_the_odd_file(name):
    """Pillow refuses only what has no end."""
    np.testing.assert_array_equal(read(HARMLESS[name][1]), by_pillow(HARMLESS[name][1]))


@pytest.mark.parametrize("transform", [2, 7, 255])
def test_an_unknown_colour_transform_is_that_of_libjpeg(transform):
    for plain, at_most in ((RGB_COLOURS, 0), (jpeg(picture(4)), 1)):
        at = plain.index(b"Adobe") + 11
        odd = plain[:at] + bytes([transform]) + plain[at + 1 :]
        assert np.abs(read(odd).astype(int) - by_pillow(odd)).max() <= at_most  # Pillow's CMYK rounds twice


def random_bytes(count: int) -> bytes:
    return np.random.default_rng(3).integers(1, 255, count, dtype=np.uint8).tobytes()


HALF = len(BASELINE) // 2 + 150
LOSSES = {
    "cut": BASELINE[:HALF],
    "cut, with an end": BASELINE[:HALF] + EOI,
    "cut, odd scan header": with_scan_numbers(BASELINE, b"\0\0\0")[:HALF],
    "cut, odd scan header, with an end": with_scan_numbers(BASELINE, b"\0\0\0")[:HALF] + EOI,
    "cut, filled with zeros": BASELINE[:HALF] + bytes(len(BASELINE) - HALF),
    "cut, filled with zeros, with an end": BASELINE[:HALF] + bytes(len(BASELINE) - HALF - 2) + EOI,
    "no code at all": BASELINE[: BASELINE.index(b"\xff\xda") + 14] + EOI,
    "rubbish before the end": BASELINE[:-2] + random_bytes(60) + EOI,
    "rubbish before a table": before(BASELINE, b"\xff\xdb", random_bytes(60)),
    "a lost table": BASELINE.replace(b"\xff\xdb", b"\x00\xdb", 1),
    "restart out of order": RESTARTS.replace(b"\xff\xd2", b"\xff\xd3", 1),
    "restart far out of order": RESTARTS.replace(b"\xff\xd2", b"\xff\xd6", 1),
    "a lost interval": RESTARTS[: RESTARTS.index(b"\xff\xd1")] + RESTARTS[RESTARTS.index(b"\xff\xd2") :],
    "two starts": BASELINE[:2] + BASELINE,
    "only tables": BASELINE[: BASELINE.index(b"\xff\xc0")] + EOI,
    "progressive called sequential": PROGRESSIVE.replace(b"\xff\xc2", b"\xff\xc0", 1),
    "bad code, odd scan header": with_scan_numbers(BASELINE[:HALF] + b"\xff\0" * 40 + BASELINE[HALF + 80 :], b"\0\0\0"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_lost_pixels_are_refused(name):
    assert isinstance(read(LOSSES[name]), str) and read(LOSSES[name]) == "corrupt_image"


@pytest.mark.parametrize("name", ["baseline", "progressive", "restarts", "odd scan header"])
def test_every_cut_is_refused_or_loses_nothing(name):
    data = {"baseline": BASELINE, "progressive": PROGRESSIVE, "restarts": RESTARTS}.get(
        name, with_scan_numbers(BASELINE, b"\0\0\0")
    )
    whole = by_pillow(data)
    used = [end for end in range(len(data)) if not isinstance(read(data[:end]), str)]
    assert used and used[0] > len(data) - 8  # bits that only fill up the last byte may be missing
    for end in used:
        np.testing.assert_array_equal(read(data[:end]), whole)


@pytest.mark.parametrize("odd", [False, True])
def test_the_end_of_a_file_that_became_zeros_is_refused_or_loses_nothing(odd):
    """A download that was cut off, into a file that had its size before."""
    data = with_scan_numbers(BASELINE, b"\0\0\0") if odd else BASELINE
    outcomes = [read(data[:-count] + bytes(count)) for count in range(1, 400)]
    assert [not isinstance(outcome, str) for outcome in outcomes[:2]] == [True, True]  # of the end marker alone
    for outcome in outcomes:
        assert isinstance(outcome, str) or (outcome == by_pillow(BASELINE)).all()


def test_an_oddity_saves_no_damaged_picture():
    """What is refused without the oddity is refused with it."""
    rng = np.random.default_rng(0)
    start = BASELINE.index(b"\xff\xda") + 14
    refused = 0
    for _ in range(400):
        damaged = bytearray(BASELINE)
        for at in rng.integers(start, len(BASELINE) - 2, 3):
            damaged[at] = int(rng.integers(256))
        if not isinstance(read(bytes(damaged)), str):
            continue
        refused += 1
        for odd in (with_scan_numbers(bytes(damaged), b"\0\0\0"), bytes(damaged[:-2]), bytes(damaged[:-2]) + bytes(99)):
            assert read(odd) == "corrupt_image"
    assert refused > 100


def test_a_plain_file_has_no_other_copy():
    for data in (BASELINE, PROGRESSIVE, RESTARTS, b"", b"\xff\xd8", b"\xff\xd8\xff", BASELINE[:40], b"\xff\xd8" * 50):
        assert harmless_copies(data) == []


@pytest.mark.parametrize(("at", "value"), [(1, 0xC3), (1, 0xC5), (1, 0xCB), (4, 12)])
def test_other_processes_are_another_format(at, value):
    """Lossless, hierarchical and arithmetic lossless frames, and 12 bits."""
    frame = BASELINE.index(b"\xff\xc0")
    data = BASELINE[: frame + at] + bytes([value]) + BASELINE[frame + at + 1 :]
    assert read(data) == "unsupported_format"


@pytest.mark.parametrize("sampling", [b"\x31\x11\x11", b"\x22\x21\x11", b"\x13\x11\x11"])
def test_samplings_without_a_name_are_another_format(sampling):
    frame = BASELINE.index(b"\xff\xc0")
    data = bytearray(BASELINE)
    data[frame + 11 : frame + 20 : 3] = sampling
    assert read(bytes(data)) == "unsupported_format"


def test_cmyk_is_that_of_adobe():
    data = jpeg(picture(4))
    ink = np.asarray(Image.open(io.BytesIO(data))).astype(float)
    expected = np.round((255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255)
    np.testing.assert_array_equal(read(data), expected)
    assert np.abs(read(data).astype(int) - by_pillow(data)).max() <= 1


def test_ycck_is_that_of_adobe():
    """The planes of a CMYK file, read as luma, two chromas and black (ITU-T T.871, section 7, and T.872)."""
    plain = jpeg(picture(4))
    y, cb, cr, black = np.moveaxis(255.0 - np.asarray(Image.open(io.BytesIO(plain))), 2, 0)
    at = plain.index(b"Adobe") + 11
    rgb = np.stack(
        [y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)], -1
    )
    # Adobe stores 255 - ink, and libjpeg turns the colours of YCCK into 255 - RGB.
    expected = (255 - np.clip(np.round(rgb), 0, 255)) * black[..., None] / 255
    found = read(plain[:at] + b"\2" + plain[at + 1 :])
    assert np.abs(found - expected).max() <= 1.5  # libjpeg rounds chroma by itself, and we round the product


def test_grey():
    data = jpeg(picture().convert("L"))
    np.testing.assert_array_equal(read(data), by_pillow(data))


def test_the_first_picture_of_a_phone():
    stream = io.BytesIO()
    first, second = picture(), Image.new("RGB", (40, 30), "red")
    first.save(stream, "MPO", save_all=True, append_images=[second], quality=90)
    assert Image.open(io.BytesIO(stream.getvalue())).n_frames == 2
    np.testing.assert_array_equal(read(stream.getvalue()), by_pillow(stream.getvalue()))


def flat(scans: list[list[int]], *, side: int = 64) -> bytes:
    """A sequential JPEG of one grey, whose components come in several scans; the tables are those of Annex K.

    A block is its difference of 0 and the end of the block: 00 1010 for luma, 00 00 for chroma (tables K.3 to K.6).
    """
    plain = jpeg(Image.new("RGB", (side, side), (128, 128, 128)), subsampling=0)
    data = plain[: plain.index(b"\xff\xda")]
    for names in scans:
        tables = b"".join(bytes([name, 0 if name == 1 else 0x11]) for name in names)
        data += segment(0xDA, bytes([len(names)]) + tables + b"\0\x3f\0")
        bits = "".join("001010" if name == 1 else "0000" for name in names) * (side // 8) ** 2
        bits += "1" * (-len(bits) % 8)
        data += int(bits, 2).to_bytes(len(bits) // 8).replace(b"\xff", b"\xff\0")
    return data + EOI


@pytest.mark.parametrize("scans", [[[3], [2], [1]], [[3], [1, 2]], [[2, 3], [1]], [[1, 2, 3]], [[1], [2], [3]]])
def test_a_sequential_picture_in_several_scans(scans):
    data = flat(scans)
    assert (read(data) == 128).all() and (read(with_scan_numbers(data, b"\0\0\0")) == 128).all()
    if 1 in scans[-1] and 3 not in scans[-1]:
        assert (read(data[:-2]) == 128).all()
    else:  # its code ends with zeros, which may also be those of a file that was cut off, so the end must be there
        assert data.endswith(b"\0" + EOI) and read(data[:-2]) == "corrupt_image"
    if len(scans) > 1:  # a colour is missing, and nothing in the code tells it
        assert read(data[: data.rindex(b"\xff\xda")]) == "corrupt_image"


def test_a_component_in_two_scans_is_refused():
    assert read(with_scan_numbers(flat([[1, 2, 3], [1, 2, 3]]), b"\0\0\0")) == "corrupt_image"


def test_scans_are_limited():
    """Not those of a film that lies behind the picture, nor what a comment holds."""
    start, end = PROGRESSIVE.rindex(b"\xff\xda"), len(PROGRESSIVE) - 2
    scans = PROGRESSIVE[2:end] + PROGRESSIVE[start:end] * 200 + EOI
    disguise = segment(0xFE, BASELINE[BASELINE.index(b"\xff\xc0") :][:19])  # the frame of another process
    for head in (b"", disguise, b"\xff" + disguise):
        assert read(PROGRESSIVE[:2] + head + scans) == "corrupt_image"
    film, comment = b"\xff\xda" * 300, segment(0xFE, b"\xff\xda" * 300)
    for data in (PROGRESSIVE + film, PROGRESSIVE[:2] + comment + PROGRESSIVE[2:]):
        np.testing.assert_array_equal(read(data), by_pillow(PROGRESSIVE))


def test_an_odd_bomb_is_refused_from_its_header():
    frame = BASELINE.index(b"\xff\xc0")
    bomb = BASELINE[: frame + 5] + struct.pack(">HH", 60_000, 60_000) + BASELINE[frame + 9 :]
    for data in (bomb, with_scan_numbers(bomb, b"\0\0\0"), bomb[:-2], bomb.replace(b"JFIF\0\1", b"JFIF\0\2")):
        assert read(data) == "image_too_large"
