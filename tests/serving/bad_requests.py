"""Requests that no service should take, as the bytes that go over the socket: BAD has (bytes, status, words of the
refusal) by name.
"""

import base64
import io
import json
import pickle
import struct
import zlib

import numpy as np
from PIL import Image

from align_cluster.rewards.wire import MEDIA_TYPE, encode_image
from align_cluster.serving.config import Limits

TOKEN = "secret"
LIMITS = Limits(
    images=4,
    image_pixels=64,
    request_pixels=200,
    prompt_chars=20,
    json_bytes=2000,
    body_bytes=20_000,
    body_timeout_s=0.8,
    concurrency=4,
)
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 6, 5, 3), dtype=np.uint8)
PNG, WEBP = (encode_image(IMAGES[0], kind) for kind in ("png", "webp"))


def http_request(body=b"", path="/v1/score", method="POST", **headers):
    """A whole request; headers that are None are left out."""
    named = {
        "Host": "service",
        "Authorization": f"Bearer {TOKEN}",
        "Connection": "close",
        "Content_Type": MEDIA_TYPE,
        "Content_Length": len(body),
    } | headers
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in named.items() if value is not None]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode("latin-1") + body


def framed(head, *files):
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return http_request(struct.pack("<Q", len(text)) + text + b"".join(files))


def request(*files, encoding="png", prompts=None, **changes):
    """A request to score that is right but for `changes`; a change to None leaves the key out."""
    head = {
        "rewards": ["bright"],
        "prompts": prompts or [{"text": "p"}] * len(files),
        "images": {"encoding": encoding, "sizes": [len(file) for file in files]},
    } | changes
    return framed({key: value for key, value in head.items() if value is not None}, *files)


def raw(height, width, data, count=1):
    return request(data, prompts=[{"text": "p"}] * count, images={"encoding": "raw", "height": height, "width": width})


def saved(mode, format, size=(5, 6), **settings):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, format, **settings)
    return buffer.getvalue()


def turned(format):
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved("RGB", format, exif=exif)


def patched(file, at, data):
    """The file with other bytes at an offset, and, for a PNG, the header's checksum made right again."""
    file = bytearray(file)
    file[at : at + len(data)] = data
    if file[:4] == b"\x89PNG":
        file[29:33] = struct.pack(">I", zlib.crc32(file[12:29]))
    return bytes(file)


def deep(levels):
    return b'{"rewards": ' + b"[" * levels + b"]" * levels + b"}"


def flow(data, path="/v1/flow_grpo/bright", **headers):
    """flow_grpo's request as JSON; images that are bytes are put into base64."""
    if isinstance(data, dict) and isinstance(images := data.get("images"), list):
        texts = [base64.b64encode(file).decode() if isinstance(file, bytes) else file for file in images]
        data = data | {"images": texts}
    body = data if isinstance(data, bytes) else json.dumps(data).encode()
    return http_request(body, path, **({"Content_Type": "application/json"} | headers))


def form(*parts, end=b"--b--\r\n", **headers):
    """flow_grpo's request as a form of parts (name, contents)."""
    body = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (name.encode(), content)
        for name, content in parts
    )
    named = {"Content_Type": "multipart/form-data; boundary=b"} | headers
    return http_request(body + end, "/v1/flow_grpo/bright", **named)


GOOD = {"rewards": ["bright"], "prompts": [{"text": "p"}], "images": {"encoding": "png", "sizes": [len(PNG)]}}
PICKLED = pickle.dumps({"images": [PNG], "prompts": ["p"], "meta_datas": [{}], "only_strict": True})
JPEG = saved("RGB", "jpeg")
SIZE = JPEG.index(b"\xff\xc0") + 5  # where its height and width are
SCORE = {
    "no body": (http_request(), 422, "starts with 8 bytes"),
    "seven bytes": (http_request(b"1234567"), 422, "starts with 8 bytes"),
    "length beyond the body": (http_request(struct.pack("<Q", 2**63) + b"{}"), 422, "only 2 follow"),
    "huge JSON": (framed(b" " * 2001), 413, "JSON has 2001 bytes"),
    "huge body": (http_request(bytes(20_001)), 413, "at most 20000"),
    "not UTF-8": (framed(b'{"rewards": ["\xff"]}'), 422, "unicode"),
    "UTF-16": (framed(json.dumps(GOOD).encode("utf-16")), 422, "JSON cannot be read"),
    "byte order mark": (framed(json.dumps(GOOD).encode("utf-8-sig")), 422, "JSON cannot be read"),
    "not JSON": (framed(b"{'rewards': []}"), 422, "cannot be read"),
    "no JSON": (framed(b""), 422, "cannot be read"),
    "nested too deeply": (framed(deep(900)), 422, ""),
    "number too long": (framed(b'{"rewards": ' + b"9" * 1900 + b"}"), 422, ""),
    "a list": (framed([GOOD]), 422, "dictionary"),
    "null": (framed(b"null"), 422, ""),
    "NaN": (request(PNG, prompts=[{"text": "p", "metadata": {"count": float("nan")}}]), 422, "JSON"),
    "infinity": (request(PNG, prompts=[{"text": "p", "metadata": {"count": float("inf")}}]), 422, "JSON"),
    "a key twice": (framed(b'{"rewards": ["a"], "rewards": ["b"]}'), 422, "twice"),
    "infinity as a number": (framed(b'{"rewards": 1e999}'), 422, "JSON"),
    "half a surrogate": (request(PNG, prompts=[{"text": "\ud800"}]), 422, "hex escape"),
    "unknown key": (request(PNG, seed=3), 422, "seed: Extra"),
    "no rewards": (request(PNG, rewards=None), 422, "rewards: Field required"),
    "empty rewards": (request(PNG, rewards=[]), 422, "rewards"),
    "rewards as text": (request(PNG, rewards="a"), 422, "rewards"),
    "a number as reward": (request(PNG, rewards=[1]), 422, "rewards.0"),
    "a reward twice": (request(PNG, rewards=["bright", "bright"]), 422, "twice"),
    "unknown reward": (request(PNG, rewards=["bright", "brihgt"]), 422, "no reward 'brihgt' here; this service has"),
    "no prompts": (framed({k: v for k, v in GOOD.items() if k != "prompts"}, PNG), 422, "prompts: Field required"),
    "empty prompts": (framed(GOOD | {"prompts": []}, PNG), 422, "prompts"),
    "prompt as text": (request(PNG, prompts=["p"]), 422, "prompts.0"),
    "prompt null": (request(PNG, prompts=[{"text": None}]), 422, "prompts.0.text"),
    "prompt too long": (request(PNG, prompts=[{"text": "x" * 21}]), 413, "prompt 0 has 21 characters"),
    "metadata as list": (request(PNG, prompts=[{"text": "p", "metadata": []}]), 422, "prompts.0.metadata"),
    "more prompts than images": (request(PNG, prompts=[{"text": "p"}] * 2), 422, "1 images came with 2 prompts"),
    "too many images": (request(*[PNG] * 5), 413, "5 images"),
    "0 images": (request(prompts=[{"text": "p"}]), 422, "images"),
    "10,000 images": (framed(GOOD | {"prompts": [{"text": "p"}] * 10_000}), 413, ""),
    "5,000 prompts": (framed(b'{"prompts": [' + b"{}," * 5_000), 413, "JSON has"),
    "no images": (request(PNG, images=None), 422, "images: Field required"),
    "no encoding": (request(PNG, images={"sizes": [len(PNG)]}), 422, "images"),
    "JPEG": (request(PNG, images={"encoding": "jpeg", "sizes": [len(PNG)]}), 415, "png"),
    "a format that is a number": (request(PNG, images={"encoding": 3, "sizes": [len(PNG)]}), 415, "images"),
    "negative size": (request(PNG, images={"encoding": "png", "sizes": [-1]}), 422, "greater than 0"),
    "size beyond 64 bits": (request(PNG, images={"encoding": "png", "sizes": [2**70]}), 422, "64 bits"),
    "size as text": (request(PNG, images={"encoding": "png", "sizes": [str(len(PNG))]}), 422, "integer"),
    "size as truth": (request(PNG, images={"encoding": "png", "sizes": [True]}), 422, "integer"),
    "sizes too small": (request(PNG, images={"encoding": "png", "sizes": [9]}), 422, "add up to 9"),
    "bytes left over": (framed(GOOD, PNG, b"\0"), 422, "add up to"),
    "empty file": (request(b"", prompts=[{"text": "p"}]), 422, "greater than 0"),
    "text as PNG": (request(b"hello"), 422, "image 0 cannot be read as PNG"),
    "WebP as PNG": (request(WEBP), 422, "cannot be read as PNG"),
    "PNG as WebP": (request(PNG, encoding="webp"), 422, "cannot be read as WEBP"),
    "truncated PNG": (request(PNG[:-30]), 422, "image 0 cannot be used: image file is truncated"),
    "PNG header only": (request(PNG[:33]), 422, "cannot be read as PNG"),
    "PNG with broken data": (request(PNG[:60] + bytes(8) + PNG[68:]), 422, "broken data stream"),
    "PNG with a wrong checksum": (request(PNG[:30] + b"\0" + PNG[31:]), 422, "cannot be read as PNG"),
    "PNG without pixels": (request(patched(PNG, 16, bytes(4))), 422, "cannot be read as PNG"),
    "bomb in a PNG": (request(patched(PNG, 16, struct.pack(">II", 100_000, 100_000))), 413, "far more than 64 pixels"),
    "PNG over the limit": (request(saved("RGB", "png", (65, 1))), 413, "65 x 1 pixels"),
    "images over the limit": (request(*[saved("RGB", "png", (8, 8))] * 4), 413, "256 pixels"),
    "two sizes": (request(PNG, saved("RGB", "png", (6, 5))), 422, "image 1 cannot be used: it has 6 x 5"),
    "second image broken": (request(PNG, PNG[:-30]), 422, "image 1"),
    "grey PNG": (request(saved("L", "png")), 422, "8-bit L;"),
    "PNG with alpha": (request(saved("RGBA", "png")), 422, "8-bit RGBA;"),
    "palette PNG": (request(saved("P", "png")), 422, "1-bit P;"),
    "16-bit PNG": (request(saved("I;16", "png")), 422, "16-bit"),
    "16-bit RGB PNG": (request(patched(PNG, 24, b"\x10")), 422, "16-bit"),
    "turned PNG": (request(turned("png")), 422, "orientation 6"),
    "animated PNG": (
        request(saved("RGB", "png", save_all=True, append_images=[Image.new("RGB", (5, 6), 9)])),
        422,
        "2 frames of 8-bit RGB",
    ),
    "truncated WebP": (request(WEBP[:-30], encoding="webp"), 422, "cannot be used"),
    "short WebP": (request(WEBP[:20], encoding="webp"), 422, "cannot be used"),
    "bomb in a WebP": (
        request(patched(WEBP, 21, b"\xff\xff\xff\x0f"), encoding="webp"),
        413,
        "far more than 64 pixels",
    ),
    "bomb in an extended WebP": (
        request(b"RIFF\x40\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(4) + b"\xff" * 6 + bytes(40), encoding="webp"),
        413,
        "far more than 64 pixels",
    ),
    "bomb in a lossy WebP": (
        request(patched(saved("RGB", "webp", quality=50), 26, b"\xff\x3f\xff\x3f"), encoding="webp"),
        413,
        "far more than 64 pixels",
    ),
    "WebP with alpha": (request(saved("RGBA", "webp", (6, 6), quality=50), encoding="webp"), 422, ""),
    "turned WebP": (request(turned("webp"), encoding="webp"), 422, "orientation 6"),
    "animated WebP": (
        request(
            saved("RGB", "webp", save_all=True, append_images=[Image.new("RGB", (5, 6), (9, 9, 9))]), encoding="webp"
        ),
        422,
        "2 frames of 8-bit RGB",
    ),
    "unknown WebP": (request(b"RIFF\x40\0\0\0WEBPVP8Q" + bytes(60), encoding="webp"), 422, "cannot be read as WEBP"),
    "raw without height": (
        request(b"", images={"encoding": "raw", "width": 5}, prompts=[{"text": "p"}]),
        422,
        "height",
    ),
    "raw of no height": (raw(0, 5, b""), 422, "greater than 0"),
    "raw of a negative height": (raw(-6, 5, bytes(90)), 422, "greater than 0"),
    "raw of a fraction": (raw(1.5, 2, bytes(9)), 422, "integer"),
    "raw too short": (raw(6, 5, bytes(89)), 422, "needs 90"),
    "raw as float32": (raw(6, 5, bytes(360)), 422, "needs 90"),
    "raw of one image for two prompts": (raw(6, 5, bytes(90), count=2), 422, "needs 180"),
    "raw over the limit": (raw(65, 1, bytes(195)), 413, "1 x 65"),
    "raw bomb": (raw(10**9, 10**9, b""), 413, "1000000000 x 1000000000"),
    "raw whose product overflows": (raw(2**32, 2**32, b""), 413, "pixels"),
    "raw of an endless height": (raw(10**200, 1, b""), 422, "64 bits"),
}
FLOW = {
    "pickle": (flow(PICKLED, Content_Type=None), 415, "unpickling runs whatever code"),
    "pickle as octets": (flow(PICKLED, Content_Type="application/octet-stream"), 415, "send the same fields as"),
    "pickle that says so": (flow(PICKLED, Content_Type="application/python-pickle"), 415, "unpickling"),
    "pickle as JSON": (flow(PICKLED), 422, "JSON cannot be read"),
    "pickle in base64": (flow({"images": [PICKLED], "prompts": ["p"]}), 422, "cannot be read as JPEG or PNG or WEBP"),
    "pickle to /v1/score": (http_request(PICKLED, Content_Type=None), 415, "RewardClient"),
    "pickle as a request": (http_request(PICKLED), 422, "only"),
    "unknown reward": (flow({}, "/v1/flow_grpo/brihgt"), 404, "no reward 'brihgt'"),
    "no reward": (flow({}, "/v1/flow_grpo/"), 404, "Not Found"),
    "climbing out": (flow({}, "/v1/flow_grpo/%2e%2e%2f%2e%2e%2fetc%2fpasswd"), 404, "Not Found"),
    "a null character": (flow({}, "/v1/flow_grpo/%00"), 404, "no reward"),
    "no token": (flow({}, Authorization=None), 401, "Bearer"),
    "no images": (flow({"prompts": ["p"]}), 422, "images: Field required"),
    "0 images": (flow({"images": [], "prompts": []}), 422, "images"),
    "image as a number": (flow({"images": [1], "prompts": ["p"]}), 422, "images.0"),
    "no base64": (flow({"images": ["?"], "prompts": ["p"]}), 422, "images.0: it is no base64"),
    "base64 without its end": (flow({"images": ["iVBOR"], "prompts": ["p"]}), 422, "images.0: it is no base64"),
    "base64 in Cyrillic": (flow({"images": ["я"], "prompts": ["p"]}), 422, "images.0: it is no base64"),
    "5 images": (flow({"images": [JPEG] * 5, "prompts": ["p"] * 5}), 413, "5 images"),
    "10,000 images": (flow({"images": ["a"] * 3000, "prompts": ["p"]}), 413, "JSON has"),
    "5,000 numbers": (flow({"images": [PNG], "prompts": ["p"], "meta_datas": [1] * 5000}), 413, "JSON has"),
    "a long record": (flow({"images": [PNG], "meta_datas": [{"prompt": "p", "note": "a" * 2500}]}), 413, "JSON has"),
    "no prompts": (flow({"images": [JPEG]}), 422, "prompts is missing"),
    "prompts that are null": (flow({"images": [JPEG], "prompts": [None]}), 422, "prompts.0"),
    "records without prompts": (flow({"images": [JPEG], "meta_datas": [{}]}), 422, "prompts is missing"),
    "too many prompts": (flow({"images": [JPEG], "prompts": ["p", "p"]}), 422, "1 images came with 2 prompts"),
    "too few records": (
        flow({"images": [JPEG] * 2, "prompts": ["p"] * 2, "meta_datas": [{}]}),
        422,
        "2 images came with 1 meta_datas",
    ),
    "a record that is text": (flow({"images": [JPEG], "prompts": ["p"], "meta_datas": ["{}"]}), 422, "meta_datas.0"),
    "a long prompt": (flow({"images": [JPEG], "prompts": ["x" * 21]}), 413, "prompt 0 has 21"),
    "strict as text": (flow({"images": [JPEG], "prompts": ["p"], "only_strict": "yes"}), 422, "only_strict"),
    "unknown field": (flow({"images": [JPEG], "prompts": ["p"], "metadatas": []}), 422, "metadatas: Extra"),
    "NaN": (flow(b'{"images": [], "prompts": [], "meta_datas": [{"count": NaN}]}'), 422, "JSON cannot be read"),
    "a list": (flow(b"[]"), 422, "dictionary"),
    "nested too deeply": (flow(deep(900)), 422, ""),
    "truncated JPEG": (flow({"images": [JPEG[:-4]], "prompts": ["p"]}), 422, "cannot be"),
    "JPEG header only": (flow({"images": [JPEG[:SIZE]], "prompts": ["p"]}), 422, "cannot be used"),
    "JPEG of many markers": (
        flow({"images": [b"\xff\xd8" + b"\xff" * 9000], "prompts": ["p"]}),
        422,
        "cannot be read as JPEG",
    ),
    "bomb in a JPEG": (
        flow({"images": [patched(JPEG, SIZE, b"\xff" * 4)], "prompts": ["p"]}),
        413,
        "far more than 64 pixels",
    ),
    "JPEG without pixels": (
        flow({"images": [patched(JPEG, SIZE, bytes(2))], "prompts": ["p"]}),
        422,
        "cannot be read as JPEG",
    ),
    "grey JPEG": (flow({"images": [saved("L", "jpeg")], "prompts": ["p"]}), 422, "8-bit L;"),
    "CMYK JPEG": (flow({"images": [saved("CMYK", "jpeg")], "prompts": ["p"]}), 422, "8-bit CMYK;"),
    "turned JPEG": (flow({"images": [turned("jpeg")], "prompts": ["p"]}), 422, "orientation 6"),
    "GIF": (flow({"images": [saved("P", "gif")], "prompts": ["p"]}), 422, "cannot be read as JPEG or PNG or WEBP"),
    "two sizes": (
        flow({"images": [JPEG, saved("RGB", "png", (6, 5))], "prompts": ["p"] * 2}),
        422,
        "image 1 cannot be used: it has 6 x 5",
    ),
    "form without boundary": (form(("images", PNG), Content_Type="multipart/form-data"), 422, "boundary"),
    "form with another boundary": (form(Content_Type="multipart/form-data; boundary=c"), 422, "boundary"),
    "form cut off": (form(("images", PNG), ("prompts", b"p"), end=b""), 422, "cut off"),
    "form without parts": (form(), 422, "images"),
    "form without images": (form(("prompts", b"p")), 422, "images: Field required"),
    "form without names": (
        http_request(b"--b\r\n\r\n\r\n--b--", "/v1/flow_grpo/bright", Content_Type="multipart/form-data; boundary=b"),
        422,
        "form cannot be read",
    ),
    "form with a broken header": (
        http_request(
            b"--b\r\n: x\r\n\r\n\r\n--b--", "/v1/flow_grpo/bright", Content_Type="multipart/form-data; boundary=b"
        ),
        422,
        "form cannot be read",
    ),
    "form of 100 parts": (form(*[("images", b"")] * 100), 413, "100 parts"),
    "form with an empty image": (form(("images", b""), ("prompts", b"p")), 422, "cannot be read as JPEG"),
    "form in Latin-1": (form(("images", PNG), ("prompts", "Käfer".encode("latin-1"))), 422, "unicode"),
    "form without prompts": (form(("images", PNG)), 422, "prompts is missing"),
    "form with NaN": (
        form(("images", PNG), ("meta_datas", b'{"prompt": "p", "count": NaN}')),
        422,
        "JSON cannot be read",
    ),
    "form with a broken record": (form(("images", PNG), ("meta_datas", b"{")), 422, "JSON cannot be read"),
    "form with a long record": (form(("images", PNG), ("meta_datas", b'"%s"' % (b"a" * 2500))), 413, "JSON has"),
    "form with a record that is a list": (form(("images", PNG), ("meta_datas", b"[]")), 422, "meta_datas.0"),
    "form that is unsure": (form(("images", PNG), ("prompts", b"p"), ("only_strict", b"maybe")), 422, "only_strict"),
    "form that is strict twice": (form(("images", PNG), *[("only_strict", b"true")] * 2), 422, "only_strict"),
    "form with an unknown field": (form(("images", PNG), ("prompts", b"p"), ("seed", b"1")), 422, "seed: Extra"),
}
START = "POST /v1/score HTTP/1.1\r\nHost: service\r\nAuthorization: Bearer secret\r\n"
NO_HTTP = (400, "Invalid HTTP request")
HTTP = {
    "no token": (http_request(Authorization=None), 401, "Bearer"),
    "a wrong token": (http_request(Authorization="Bearer wrong"), 401, "Bearer"),
    "half a token": (http_request(Authorization="Bearer secre"), 401, "Bearer"),
    "an empty token": (http_request(Authorization="Bearer"), 401, "Bearer"),
    "a token outside ASCII": (http_request(Authorization="Bearer käse"), 401, "Bearer"),
    "another scheme": (http_request(Authorization=f"Basic {TOKEN}"), 401, "Bearer"),
    "a long token": (http_request(Authorization="Bearer " + "x" * 60_000), 401, "Bearer"),
    "a large header": (http_request(X="x" * 70_000), 431, "at most 65536"),
    "a huge header": (http_request(X="x" * 10**6), 431, "more than 131072"),
    "10,000 headers": (http_request(**{f"X{i}": i for i in range(10_000)}), 431, "at most 65536"),
    "no type": (http_request(b"{}", Content_Type=None), 415, MEDIA_TYPE),
    "JSON": (http_request(b"{}", Content_Type="application/json"), 415, MEDIA_TYPE),
    "text": (http_request(b"hello", Content_Type="text/plain; charset=utf-8"), 415, MEDIA_TYPE),
    "an image": (http_request(PNG, Content_Type="image/png"), 415, MEDIA_TYPE),
    "a body in gzip": (http_request(zlib.compress(PNG), Content_Encoding="gzip"), 422, "JSON"),
    "GET": (http_request(method="GET"), 405, "Method Not Allowed"),
    "PUT": (http_request(method="PUT"), 405, "Method Not Allowed"),
    "DELETE": (http_request(method="DELETE"), 405, "Method Not Allowed"),
    "TRACE": (http_request(method="TRACE"), 405, "Method Not Allowed"),
    "POST to what is read": (http_request(path="/v1/rewards"), 405, "Method Not Allowed"),
    "BREW": (http_request(method="BREW"), *NO_HTTP),
    "a method in lower case": (http_request(method="post"), *NO_HTTP),
    "CONNECT": (http_request(method="CONNECT", path="elsewhere:80"), *NO_HTTP),
    "another path": (http_request(path="/v1/scores"), 404, "Not Found"),
    "a slash too many": (http_request(path="/v1/score/"), 404, "Not Found"),
    "climbing up": (http_request(method="GET", path="/v1/../../etc/passwd"), 404, "Not Found"),
    "a long path": (http_request(path="/" + "a" * 10**5), *NO_HTTP),
    "a path outside ASCII": (http_request(path="/ÿ"), *NO_HTTP),
    "an old HTTP": (b"GET /\r\n\r\n", 404, "Not Found"),
    "a HTTP of the future": (http_request().replace(b"HTTP/1.1", b"HTTP/9.9"), *NO_HTTP),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", *NO_HTTP),
    "TLS": (bytes.fromhex("16030100a5010000a10303") + bytes(160), *NO_HTTP),
    "noise": (bytes(range(256)), *NO_HTTP),
    "a line that is no header": (f"{START}garbage\r\n\r\n".encode(), *NO_HTTP),
    "a header in two lines": (f"{START}X: a\r\n b\r\n\r\n".encode(), *NO_HTTP),
    "a null character in a header": (f"{START}X: a\0b\r\n\r\n".encode(), *NO_HTTP),
    "a negative length": (http_request(Content_Length=-1), *NO_HTTP),
    "a length that is none": (http_request(Content_Length="abc"), *NO_HTTP),
    "a length beyond 64 bits": (http_request(Content_Length=10**30), *NO_HTTP),
    "a giant that is announced": (http_request(Content_Length=10**15), 413, "1000000000000000 bytes"),
    "a giant that asks first": (http_request(Content_Length=10**15, Expect="100-continue"), 413, "bytes"),
    "two lengths": (f"{START}Content-Length: 5\r\nContent-Length: 6\r\n\r\n123456".encode(), *NO_HTTP),
    "a length and chunks": (http_request(b"0\r\n\r\n", Transfer_Encoding="chunked"), *NO_HTTP),
    "a length that is too small": (http_request(struct.pack("<Q", 2) + b"{}", Content_Length=9), 422, "only 1 follow"),
    "a second request in the body": (
        http_request(http_request(path="/admin"), Content_Length=0),
        422,
        "the body has 0 bytes",
    ),
    "chunks of no number": (http_request(b"zz\r\n\r\n", Content_Length=None, Transfer_Encoding="chunked"), *NO_HTTP),
    "chunks beyond 64 bits": (
        http_request(b"F" * 20 + b"\r\n", Content_Length=None, Transfer_Encoding="chunked"),
        *NO_HTTP,
    ),
    "chunks of a negative size": (
        http_request(b"-5\r\nabc\r\n", Content_Length=None, Transfer_Encoding="chunked"),
        *NO_HTTP,
    ),
    "chunks over the limit": (
        http_request((b"2710\r\n" + bytes(10_000) + b"\r\n") * 3, Content_Length=None, Transfer_Encoding="chunked"),
        413,
        "more than 20000 bytes",
    ),
    "another transfer encoding": (http_request(Content_Length=None, Transfer_Encoding="gzip"), *NO_HTTP),
}
SLOW = {
    "half a body": (http_request(b"12345", Content_Length=100), 408, "within 0.8 s"),
    "chunks without an end": (
        http_request(b"5\r\n12345\r\n", Content_Length=None, Transfer_Encoding="chunked"),
        408,
        "within 0.8 s",
    ),
    "half a form": (form(("images", PNG), end=b"", Content_Length=1000), 408, "within 0.8 s"),
}
BAD = {
    f"{kind}: {name}": case
    for kind, cases in (("score", SCORE), ("flow_grpo", FLOW), ("http", HTTP), ("slow", SLOW))
    for name, case in cases.items()
}
