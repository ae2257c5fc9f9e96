"""PNG, WebP and JPEG files of strangers: their size is read from the header, before anything is decoded.

Pillow itself would allocate a WebP's frames, up to 2 GB, as soon as the file is opened.
"""

import io
import struct
from typing import Literal

import numpy as np
from PIL import Image

Format = Literal["png", "webp", "jpeg"]
ORIENTATION = 0x0112  # EXIF: 1, and 0 for unknown, is upright
SIZED_ELSEWHERE = (0xC4, 0xC8, 0xCC)  # JPEG segments among C0 to CF that are no frame headers


def encode(image: np.ndarray, format: Literal["png", "webp"]) -> bytes:
    """The file of an image uint8 [H, W, 3], without loss."""
    buffer = io.BytesIO()
    settings = {"compress_level": 1} if format == "png" else {"lossless": True, "method": 0}
    Image.fromarray(image).save(buffer, format, **settings)
    return buffer.getvalue()


def format_of(file: bytes) -> Format:
    """The format by the first bytes. ValueError for anything else."""
    if file[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if file[:4] == b"RIFF":
        return "webp"
    if file[:3] == b"\xff\xd8\xff":
        return "jpeg"
    raise ValueError("it is neither JPEG nor PNG nor WebP")


def size_of(file: bytes, format: Format) -> tuple[int, int]:
    """(width, height) as the header of an 8-bit RGB image says. ValueError for anything else."""
    return {"png": png_size, "webp": webp_size, "jpeg": jpeg_size}[format](file)


def decode(file: bytes, format: Format, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] of a file whose header says `size`. ValueError where it is broken or something else."""
    try:
        with Image.open(io.BytesIO(file), formats=[format]) as image:
            if image.size != size or image.mode != "RGB" or getattr(image, "n_frames", 1) != 1:
                raise ValueError(f"it is {image.mode} of {image.size}; send a single RGB image")
            pixels = np.asarray(image)
            turned = image.getexif().get(ORIENTATION, 1)
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"it cannot be decoded: {error}") from None
    if turned not in (0, 1):
        raise ValueError(f"it is to be turned before it is shown (EXIF orientation {turned}); send it upright")
    return pixels


def png_size(file: bytes) -> tuple[int, int]:
    """(width, height) in the header of an 8-bit RGB PNG. ValueError for anything else."""
    if len(file) < 33 or file[:8] != b"\x89PNG\r\n\x1a\n" or file[12:16] != b"IHDR":
        raise ValueError("it is no PNG")
    width, height, depth, color = struct.unpack_from(">IIBB", file, 16)
    if (depth, color) != (8, 2):
        raise ValueError(f"it is a PNG of {depth} bits and colour type {color}; send 8-bit RGB without alpha")
    return _positive(width, height)


def webp_size(file: bytes) -> tuple[int, int]:
    """(width, height) in the header of a still RGB WebP. ValueError for anything else."""
    if len(file) < 30 or file[:4] != b"RIFF" or file[8:12] != b"WEBP":
        raise ValueError("it is no WebP")
    kind, data = file[12:16], file[20:30]
    if kind == b"VP8X":
        if data[0] & 0b00010010:
            raise ValueError("it is a WebP with alpha or of several frames; send a still RGB image")
        return 1 + int.from_bytes(data[4:7], "little"), 1 + int.from_bytes(data[7:10], "little")
    if kind == b"VP8L" and data[0] == 0x2F:
        bits = int.from_bytes(data[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and data[3:6] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 6)
        return _positive(width & 0x3FFF, height & 0x3FFF)
    raise ValueError("it is no WebP")


def jpeg_size(file: bytes) -> tuple[int, int]:
    """(width, height) in the first frame header of an 8-bit JPEG of three colours. ValueError for anything else."""
    at = 2
    while file[:2] == b"\xff\xd8" and at + 10 <= len(file) and file[at] == 0xFF:
        kind, length = file[at + 1], int.from_bytes(file[at + 2 : at + 4], "big")
        if 0xC0 <= kind <= 0xCF and kind not in SIZED_ELSEWHERE:
            depth, height, width, colors = struct.unpack_from(">BHHB", file, at + 4)
            if (depth, colors) != (8, 3):
                raise ValueError(f"it is a JPEG of {depth} bits and {colors} colours; send 8-bit RGB")
            return _positive(width, height)
        at += 1 if kind == 0xFF else 2 + length  # a byte of filling, or a segment
    raise ValueError("it is no JPEG")


def _positive(width: int, height: int) -> tuple[int, int]:
    if not (width and height):
        raise ValueError("it has no pixels")
    return width, height
