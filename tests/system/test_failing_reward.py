"""Real Ray runs with a reward that stops to work: on a service that answers, until it does not."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from align_cluster.errors import UserError
from align_cluster.observe.sinks import read_jsonl
from align_cluster.rewards.wire import PREFIX


class Service(BaseHTTPRequestHandler):
    """Scores an image by the length of its file, for as many images as `left` says, and then answers with 500."""

    left = 0
    lock = threading.Lock()

    def do_GET(self) -> None:
        self.reply(200, {"rewards": [{"name": "far"}]})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        (length,) = PREFIX.unpack_from(body)
        sizes = json.loads(body[PREFIX.size : PREFIX.size + length])["images"]["sizes"]
        with self.lock:
            type(self).left -= len(sizes)
        if self.left < 0:
            self.reply(500, {"detail": "the model is gone"})
            return
        scores = {"values": [float(size) for size in sizes], "valid": [True] * len(sizes)}
        self.reply(200, {"rewards": {"far": scores}, "seconds": 0.1})

    def reply(self, status: int, answer: dict) -> None:
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *about: object) -> None:
        pass


@pytest.fixture
def far(tiny) -> Iterator:
    """Function (images, *overrides) -> a run's settings with a reward of a service that scores so many images."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def make(images: int, *overrides: str):
        Service.left = images
        own = f"rewards.far={{kind: http, url: 'http://127.0.0.1:{server.server_port}', reward: far}}"
        return tiny("nft", own, "rewards.far.on_failure.retries=0", "steps=5", "evaluate.grid_every=0", *overrides)

    yield make
    server.shutdown()


def test_a_reward_that_never_scores_ends_the_run_at_its_first_evaluation_with_its_own_error(far, train):
    with pytest.raises(UserError, match=r"rewards\.far has no score .* first evaluation \(unavailable: .* is gone"):
        train(far(0))


def test_a_reward_that_stops_to_score_ends_the_run_after_so_many_steps_whose_rows_are_kept(far, local_ray, tmp_path):
    from align_cluster.loop import driver

    config = far(4 + 4 + 8, "rewards.far.on_failure.stop_after=2")  # the evaluation, its grid, and the first step
    with pytest.raises(UserError, match=r"step 3: rewards\.far has no score .* 2 steps in a row \(unavailable: .*gone"):
        driver.train(config, tmp_path)
    (folder,) = tmp_path.iterdir()
    rows = read_jsonl(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3] and [row["train/empty"] for row in rows] == [0, 1, 1]
    assert [row.get("reward/far/failed/unavailable") for row in rows] == [None, 8, 8]
    assert ["reward/far/mean" in row for row in rows] == [True, False, False]
