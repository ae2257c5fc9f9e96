import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from reward_load import BATCH, IMAGES, REQUEST, Asked, Batch, disturbance, figures, medians, piece, slow_seconds, wrong

from align_cluster.rewards.wire import encode_image

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "reward_service.py"


def answers(seconds, start=0.0, every=0.1):
    return [Asked(start + index * every, spent, np.zeros(1)) for index, spent in enumerate(seconds)]


def env(**more):
    paths = os.pathsep.join(map(str, (SCRIPT.parent, SCRIPT.parents[1])))
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"PYTHONPATH": paths} | more


@pytest.mark.exhaustive
def test_images_are_as_large_as_photographs_and_the_same_in_every_process():
    images, prompts = piece(1, REQUEST)
    assert images.shape == (REQUEST, 512, 512, 3) and len({prompt.text for prompt in prompts}) == 1
    sizes = [len(encode_image(image, "png")) for image in images]
    assert min(sizes) > 300_000 and max(sizes) < 500_000
    code = "import hashlib, reward_load as r; print(hashlib.sha256(r.piece(1, 4)[0].tobytes()).hexdigest())"
    elsewhere = subprocess.run([sys.executable, "-c", code], env=env(), capture_output=True, text=True, check=True)
    assert elsewhere.stdout.split()[-1] == hashlib.sha256(images.tobytes()).hexdigest()


def test_requests_go_around_the_images_and_batches_hold_the_same_ones():
    (batch, prompts), again = piece(2, BATCH), piece(2 + IMAGES // BATCH, BATCH)
    parts = [piece(2 * BATCH // REQUEST + index, REQUEST) for index in range(BATCH // REQUEST)]
    np.testing.assert_array_equal(batch, np.concatenate([images for images, _ in parts]))
    np.testing.assert_array_equal(batch, again[0])
    assert prompts == [prompt for _, found in parts for prompt in found] == again[1]


def test_answers_with_an_error_or_with_the_scores_of_other_images_are_wrong():
    expected = np.arange(IMAGES, dtype=float)
    right = [Asked(0, 1, expected[index * 4 % IMAGES :][:4]) for index in range(20)]
    assert wrong(right, expected) == []
    swapped = [right[1], right[0], Asked(0, 1, None, "timeout: late"), *right[3:]]
    assert [message[:9] for message in wrong(swapped, expected)] == ["request 0", "request 1", "timeout: "]


def test_rates_count_from_the_end_of_the_first_batch():
    batches = [Batch(4, 0, 1), Batch(16, 1.5, 3), Batch(8, 3, 4)]
    found = figures(answers([1, 2, 3]), 4, batches)
    assert found["images_per_s"] == 24 / 3 and found["requests_per_s"] == 2
    assert found["batch_fill"] == 0.75 and found["busy"] == pytest.approx(2.5 / 3)
    assert found["model_ms"] == pytest.approx(1000 * 2.5 / 24) and found["p50_ms"] == 2000


def test_ratios_are_of_one_round():
    rounds = [
        {"bare": {"images_per_s": bare}, "http": {"images_per_s": http}} for bare, http in ((10, 9), (5, 4), (8, 4))
    ]
    found = medians(rounds)
    assert found["http"] == {"images_per_s": 4, "ratio": 0.8} and found["bare"]["ratio"] == 1


def test_a_p95_is_slow_while_slow_requests_are_among_those_of_the_last_three_seconds():
    asked = answers([0.1] * 100 + [1.0] * 20 + [0.1] * 100)
    assert slow_seconds(asked, 0.2, 3, 20) == pytest.approx(2 + 3, abs=0.3)
    assert slow_seconds(asked, 1.5, 3, 20) == 0


def test_requests_that_were_in_work_when_the_replica_died_are_no_part_of_the_normal_time():
    asked = answers([0.1] * 100 + [5.0] * 5 + [0.1] * 95)
    found = disturbance(asked, 10.2, ["lost one"])
    assert found["normal_p95_ms"] == pytest.approx(100) and found["slow_requests"] == 5 and found["lost"] == 1
    assert found["slow_before_s"] == 0 and found["slow_s"] > 3 and found["slowest_ms"] == pytest.approx(5000)
    assert found["recovered"] and not disturbance(asked[:110], 10.2, [])["recovered"]


@pytest.mark.exhaustive
def test_the_whole_benchmark_works():
    pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
    with tempfile.TemporaryDirectory(prefix="ac-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, SCRIPT, "run", "--quick"]
        done = subprocess.run(command, env=env(RAY_TMPDIR=folder), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| lost | 0 of " in done.stdout and done.stdout.count("\n| 1 | 4 |") == 1
