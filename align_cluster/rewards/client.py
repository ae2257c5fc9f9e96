"""Asks a reward service: `RewardClient(url).score(["clip"], images, prompts)`."""

import contextlib
import http.client
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import numpy as np
from PIL import Image
from pydantic import model_validator

from align_cluster.errors import UserError
from align_cluster.rewards.base import RewardError
from align_cluster.rewards.hedge import Call, hedged
from align_cluster.rewards.wire import MEDIA_TYPE, Encoding, decode_answer, encode_request
from align_cluster.settings import Section
from align_cluster.types import FailureKind, Prompt, Scores

# The kind of a refusal by its HTTP status; others are "unavailable".
KINDS: dict[int, FailureKind] = dict.fromkeys((400, 413, 415, 422), "bad_input") | dict.fromkeys((408, 504), "timeout")


class Token(Section):
    """Where a bearer token is: in an environment variable, or alone in a file."""

    env: str | None = None
    file: str | None = None

    @model_validator(mode="after")
    def one_source(self) -> "Token":
        if (self.env is None) == (self.file is None):
            raise ValueError("either env, the name of a variable, or file, a path")
        return self

    def read(self) -> str:
        """The token. UserError where there is none."""
        try:
            text = os.environ.get(self.env, "") if self.env else Path(self.file).expanduser().read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"token.file: {self.file} cannot be read ({error}); put the token there") from None
        token, source = text.strip(), f"token.env: {self.env}" if self.env else f"token.file: {self.file}"
        if not token or not token.isascii() or not token.isprintable() or " " in token:
            raise UserError(f"{source} holds no token; put one word of ASCII there, as `openssl rand -hex 32` prints")
        return token


def address(url: str) -> SplitResult:
    """The parts of a service's address. ValueError says what it must be."""
    try:
        parts = urlsplit(url)
        whole = parts.hostname and parts.port != 0 and not (parts.query or parts.fragment or parts.username)
    except ValueError:
        whole = False
    if not whole or parts.scheme not in ("http", "https") or any(char.isspace() for char in url):
        raise ValueError("the address of a service such as http://10.0.0.5:8000")
    return parts


class RewardClient:
    """Talks to the service at `url`. Errors are RewardErrors: timeout, unavailable, bad_input.

    `timeout_s` is for a whole request. With `hedge_s`, images that have no scores after so many seconds are sent once
    more, and the first answer counts. Safe to use from several threads.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        timeout_s: float = 120,
        encoding: Encoding = "png",
        hedge_s: float | None = None,
    ) -> None:
        try:
            parts = address(url)
        except ValueError as error:
            raise UserError(f"{url!r} is no address; it must be {error}") from None
        self.url = url.rstrip("/")
        self.connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.host, self.path = parts.netloc, parts.path.rstrip("/")
        self.timeout_s, self.encoding, self.hedge_s = timeout_s, encoding, hedge_s
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}

    def rewards(self) -> dict[str, dict]:
        """What the service offers: by name the kind, inputs and version of each reward."""
        try:
            answer = self._ask("GET", "/v1/rewards", None, self._deadline(), Call())
            return {reward["name"]: reward for reward in json.loads(answer)["rewards"]}
        except (ValueError, KeyError, TypeError):
            raise RewardError("unavailable", f"{self.url} is no reward service") from None

    def ready(self) -> None:
        """Returns where every reward can be scored with."""
        self._ask("GET", "/readyz", None, self._deadline(), Call())

    def score(self, rewards: Sequence[str], images: np.ndarray, prompts: Sequence[Prompt]) -> Scores:
        """Scores of images uint8 [B, H, W, 3], one prompt an image."""
        body, deadline = encode_request(rewards, images, prompts, self.encoding), self._deadline()
        answer = hedged(lambda call: self._ask("POST", "/v1/score", body, deadline, call), self.hedge_s)
        try:
            scores = decode_answer(answer, len(images))
            if set(scores.values) != set(rewards):
                raise ValueError(f"scores of {', '.join(scores.values) or 'nothing'}")
            return scores
        except ValueError as error:
            raise RewardError("unavailable", f"{self.url} answered something else than scores: {error}") from None

    def _deadline(self) -> float:
        return time.monotonic() + self.timeout_s

    def _ask(self, method: str, path: str, body: bytes | None, deadline: float, call: Call) -> bytes:
        connection = self.connect(self.host)
        try:
            connection.timeout = _left(deadline)
            connection.connect()
            sock = call.made(connection.sock)
            sock.settimeout(_left(deadline))
            # A service may refuse a request before all of it has arrived; its answer says why.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, self.path + path, body, self.headers | {"Content-Type": MEDIA_TYPE})
            sock.settimeout(_left(deadline))
            answer = bytearray()
            with connection.getresponse() as response:
                while chunk := response.read1(2**16):
                    answer += chunk
                    sock.settimeout(_left(deadline))
                if response.length:  # read1 takes an early end for the end
                    raise http.client.IncompleteRead(bytes(answer), response.length)
        except TimeoutError:
            raise RewardError("timeout", f"{self.url} did not answer within {self.timeout_s:g} s") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise RewardError("unavailable", f"{self.url} does not answer: {error or type(error).__name__}") from None
        finally:
            connection.close()
        if response.status == 200:
            return bytes(answer)
        reason = _reason(answer) or response.reason
        raise RewardError(KINDS.get(response.status, "unavailable"), f"{self.url} says {response.status}: {reason}")


def _left(deadline: float) -> float:
    """Seconds until then. TimeoutError where it has passed."""
    if (left := deadline - time.monotonic()) <= 0:
        raise TimeoutError
    return left


def _reason(answer: bytes) -> str | None:
    try:
        return str(json.loads(answer)["detail"])
    except (ValueError, KeyError, TypeError):
        return None


def read_image(path: str | Path) -> np.ndarray:
    """An image file of any kind as uint8 RGB [H, W, 3]. UserError where it is none."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from None
