"""Requests to score on their way from `encode_request` to the service."""

import struct
import tracemalloc
import zlib

import numpy as np
import psutil
import pytest
from fastapi import HTTPException

from align_cluster.rewards.wire import encode_image, encode_request
from align_cluster.serving.config import Limits
from align_cluster.serving.decoding import decode_images, decode_request
from align_cluster.types import Prompt

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 6, 5, 3), dtype=np.uint8)
PROMPTS = [Prompt(0, "a red circle", {"include": [{"class": "circle", "count": 1}]}), Prompt(1, "ein Käfer 🪲")]
LIMITS = Limits(images=4, image_pixels=64, request_pixels=200, prompt_chars=20, json_bytes=2000, body_bytes=20_000)
ENCODINGS = ("png", "webp", "raw")


def test_a_request_arrives_as_it_was_sent():
    for encoding in ENCODINGS:
        rewards, images, prompts = decode_request(encode_request(["a", "b"], IMAGES, PROMPTS, encoding), LIMITS)
        assert rewards == ["a", "b"] and images.dtype == np.uint8
        np.testing.assert_array_equal(images, IMAGES)
        assert prompts == PROMPTS and [p.metadata for p in prompts] == [p.metadata for p in PROMPTS]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_before_memory_is_taken_for_it():
    """A small file whose header tells of many pixels; Pillow itself refuses from 178,956,970 on."""
    for encoding, at, size in (
        ("png", 16, struct.pack(">II", 13_000, 13_000)),
        ("png", 16, struct.pack(">II", 20_000, 20_000)),
        ("webp", 21, struct.pack("<I", 12_999 | 12_999 << 14)),
        ("webp", 21, struct.pack("<I", 16_383 | 16_383 << 14)),
    ):
        file = bytearray(encode_image(IMAGES[0], encoding))
        file[at : at + len(size)] = size
        if encoding == "png":
            file[29:33] = struct.pack(">I", zlib.crc32(file[12:29]))
        before = psutil.Process().memory_info().rss
        tracemalloc.start()
        with pytest.raises(HTTPException, match="413: .* pixels"):
            decode_images([bytes(file)] * 2, [encoding.upper()], Limits())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20, (encoding, peak)
        assert psutil.Process().memory_info().rss - before < 8 * 2**20  # The pixels would take 500 MB and more.


def test_whatever_is_broken_in_a_request_is_refused_or_harmless():
    rng = np.random.default_rng(0)
    for encoding in ENCODINGS:
        good = encode_request(["a"], IMAGES, PROMPTS, encoding)
        for _ in range(300):
            body = bytearray(good)
            for at in rng.integers(0, len(body), rng.integers(1, 4)):
                body[at] = rng.integers(256)
            try:
                _, images, prompts = decode_request(bytes(body[: rng.integers(1, 2 * len(body))]), LIMITS)
            except HTTPException as refusal:
                assert refusal.status_code in (413, 415, 422)
                continue
            assert images.dtype == np.uint8 and images.ndim == 4 and len(images) == len(prompts)
