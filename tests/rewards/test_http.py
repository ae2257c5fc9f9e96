"""What the client of a reward service makes of services that misbehave, over real sockets."""

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from itertools import repeat

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from align_cluster.cli import main
from align_cluster.errors import UserError
from align_cluster.rewards.base import RewardError
from align_cluster.rewards.http import Http, RewardClient, Token, read_image
from align_cluster.types import Prompt

IMAGES = np.zeros((3, 4, 4, 3), np.uint8)
PROMPTS = [Prompt(i, f"p{i}") for i in range(3)]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def answered(body: bytes, status: str = "200 OK") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(body), body)


def scored(**changes: object) -> bytes:
    part = {"values": [0.0] * 3, "valid": [True] * 3} | changes
    return answered(json.dumps({"rewards": {"bright": part}, "seconds": 0.1}).encode())


DEEP = b"[" * 100_000
NOT_SCORES = "something else than scores"
MISBEHAVE = {  # What a service sends, with what it repeats without an end if anything; the failure's kind and words.
    "nothing": (b"", None, "unavailable", "does not answer"),
    "another protocol": (b"SSH-2.0-OpenSSH\r\n", None, "unavailable", "does not answer"),
    "a body that is cut off": (OK % 50 + b"{}", None, "unavailable", "does not answer"),
    "no scores": (OK % 2 + b"{}", None, "unavailable", NOT_SCORES),
    "a large body": (OK % 10**8, bytes(2**20), "unavailable", "more than 1073152 bytes"),
    "a body without an end": (CHUNKS, b"10000\r\n%s\r\n" % bytes(2**16), "unavailable", "more than 1073152 bytes"),
    "headers without an end": (
        b"HTTP/1.1 200 OK\r\n",
        b"X: %s\r\n" % bytes(2**10).hex().encode(),
        "unavailable",
        "does not answer",
    ),
    "a redirection": (
        b"HTTP/1.1 302 Found\r\nLocation: http://elsewhere\r\nContent-Length: 0\r\n\r\n",
        None,
        "unavailable",
        "302: Found",
    ),
    "a proxy's page": (answered(b"html", "502 Bad Gateway"), None, "unavailable", "502: Bad Gateway"),
    "a proxy's timeout": (answered(b"", "504 Timeout"), None, "timeout", "504"),
    "a refusal": (answered(b'{"detail":"x"}', "422 No"), None, "bad_input", "422: x"),
    "a refusal in colours and lines": (
        answered(json.dumps({"detail": "a\n\x1b[31mb\u202e\0" + "c" * 10**6}).encode(), "422 No"),
        None,
        "bad_input",
        r"422: a \[31mb c+…$",
    ),
    "a refusal that is nested": (answered(DEEP, "422 No"), None, "bad_input", "422: No"),
    "nested": (answered(DEEP), None, "unavailable", "recursion limit"),
    "a number of 5,000 digits": (answered(b"1" * 5000), None, "unavailable", NOT_SCORES),
    "no UTF-8": (answered(b'{"rewards": {"\xff": 1}}'), None, "unavailable", NOT_SCORES),
    "NaN": (scored(values=[float("nan")] * 3), None, "unavailable", "finite number"),
    "infinity": (answered(b'{"rewards": {"bright": {"values": [1e999]}}}'), None, "unavailable", "finite number"),
    "a valid null": (scored(values=[None, 0.0, 0.0]), None, "unavailable", "valid images without a value"),
    "too few": (scored(valid=[True]), None, "unavailable", "bright.valid has 1 entries for 3 images"),
    "a failure of no image": (
        scored(failure={"kind": "oom", "message": "m", "rows": [3]}),
        None,
        "unavailable",
        "none of the 3 images",
    ),
    "257 columns": (scored(details={str(i): [] for i in range(257)}), None, "unavailable", "at most 256 items"),
    "100,000 columns": (scored(details={str(i): [] for i in range(100_000)}), None, "unavailable", "more than 1073152"),
    "a column in lines": (scored(details={"a\nb": [0.0] * 3}), None, "unavailable", NOT_SCORES),
    "silence": (b"", b"", "timeout", "within 0.3 s"),
    "a status line that drips": (b"H", b"T", "timeout", "within 0.3 s"),
    "headers that drip": (b"HTTP/1.1 200 OK\r\nX: ", b"x", "timeout", "within 0.3 s"),
    "a body that drips": (OK % 1000, b" ", "timeout", "within 0.3 s"),
    "greetings that drip": (b"", b"HTTP/1.1 100 Continue\r\n\r\n", "timeout", "within 0.3 s"),
}
DRIPS = 0.05  # s between two pieces that are short


@contextlib.contextmanager
def service(said: bytes, again: bytes | None) -> Iterator[str]:
    """A service that says something, then the same again and again, until the client has had enough."""
    over = threading.Event()

    def serve(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection, contextlib.suppress(OSError):
            connection.settimeout(5)
            with connection.makefile("rb") as asked:  # all of it, because closing before would reset the connection
                asked.read(int(http.client.parse_headers(asked).get("Content-Length", 0)) if asked.readline() else 0)
            connection.sendall(said)
            for piece in repeat(again) if again is not None else ():
                if over.wait(0 if len(piece) > 100 else DRIPS):
                    return
                connection.sendall(piece)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
        finally:
            over.set()
            thread.join()


@pytest.mark.parametrize("name", MISBEHAVE)
def test_services_that_misbehave_fail_in_their_kind_and_in_one_line(name):
    said, again, kind, words = MISBEHAVE[name]
    with service(said, again) as url, pytest.raises(RewardError, match=words) as caught:
        timeout_s = 0.3 if kind == "timeout" else 20
        RewardClient(url, timeout_s=timeout_s).score(["bright"], IMAGES, PROMPTS)
    assert caught.value.kind == kind and str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_what_a_service_says_about_a_failure_is_one_printable_line():
    failure = {"kind": "oom", "message": "a\r\nb\x1b[2J" + "c" * 10**5, "rows": [0, 1, 2]}
    with service(scored(values=[None] * 3, valid=[False] * 3, failure=failure), None) as url:
        scores = RewardClient(url).score(["bright"], IMAGES, PROMPTS)
    assert scores.failures["bright"].message == "a b [2J" + "c" * 292 + "…"


NO_REWARDS = [b"[]", b"{}", b'{"rewards": [1]}', b'{"rewards": {"clip": 1}}', DEEP, b"\xff"]


@pytest.mark.parametrize("body", NO_REWARDS, ids=range(len(NO_REWARDS)))
def test_what_is_no_list_of_rewards_comes_from_no_reward_service(body):
    with service(answered(body), None) as url, pytest.raises(RewardError, match="is no reward service"):
        RewardClient(url).rewards()


def test_a_prompt_that_json_cannot_hold_is_bad_input_and_is_not_sent():
    endless: list = []
    endless.append(endless)
    client = RewardClient("http://no-such-host.invalid")
    for value in (float("nan"), float("inf"), endless, {1, 2}):
        with pytest.raises(RewardError, match="cannot be written as JSON") as caught:
            client.score(["clip"], IMAGES[:1], [Prompt(0, "p", {"value": value})])
        assert caught.value.kind == "bad_input"


def test_what_is_no_address_is_refused_with_an_example():
    urls = ["", "10.0.0.5:8000", "ftp://a", "http://", "http://[::1", "http://a:99999", "http://a b", "http://a?b"]
    for url in [*urls, "http://me:pw@a"]:
        with pytest.raises(UserError, match="such as http://10.0.0.5:8000"):
            RewardClient(url)
        password = "@" in url  # No setting at all may hold one.
        with pytest.raises(ValidationError, match="without a user or password" if password else "such as http://10.0"):
            Http.Config(url=url, reward="clip")


def test_a_host_that_nobody_knows_is_unavailable():
    for host in ("no-such-host.invalid", "a" * 70):
        with pytest.raises(RewardError) as caught:
            RewardClient(f"http://{host}", timeout_s=5).ready()
        assert caught.value.kind == "unavailable"


def test_what_is_no_time_for_a_request_is_refused():
    for seconds in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="a positive number of seconds"):
            RewardClient("http://a", timeout_s=seconds)


def test_a_token_file_that_is_none_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "latin").write_bytes(b"\xff")
    for path in ("/dev/zero", str(tmp_path), str(tmp_path / "latin")):
        with pytest.raises(UserError, match="^token.file: "):
            Token(file=path).read()
    for path in ("a\0b", "~nobody-of-this-name/x"):
        with pytest.raises(ValidationError, match="something else"):
            Token(file=path)


NO_METADATA = ["[1]", "1", "{", '{"a": NaN}', '{"a": 1e999}', '{"a":' * 10**5, '{"a": %s}' % ("1" * 5000)]


@pytest.mark.parametrize("metadata", NO_METADATA, ids=range(len(NO_METADATA)))
def test_metadata_that_no_service_takes_is_refused_before_anything_is_read(metadata, capsys):
    command = "score --url http://a --reward clip --prompt p no-image.png --metadata".split()
    assert main([*command, metadata]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --metadata ") and "as a JSON object" in line and len(line) < 800


def test_an_image_to_score_keeps_its_greys_of_16_bits_and_one_without_a_known_white_is_a_sentence(tmp_path):
    Image.fromarray(np.array([[0, 257 * 40, 65_535]], np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png").tolist() == [[[0] * 3, [40] * 3, [255] * 3]]
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(UserError, match="float.tiff cannot be read as an image: its pixels are numbers of 32 bits"):
        read_image(tmp_path / "float.tiff")
