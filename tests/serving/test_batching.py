import asyncio
import threading

import numpy as np

from align_cluster.serving.batching import MicroBatcher
from align_cluster.types import Failure, Prompt, Scores


class Worker:
    """Scores an image by its first byte, and remembers which batches it got; an image with prompt "bad" fails."""

    def __init__(self) -> None:
        self.batches, self.threads = [], {threading.get_ident()}
        self.open = threading.Event()

    def score(self, images, prompts):
        self.open.wait(5)
        self.threads.add(threading.get_ident())
        self.batches.append([image[0, 0, 0] for image in images])
        if any(prompt.text == "crash" for prompt in prompts):
            raise RuntimeError("crash")
        bad = np.array([prompt.text == "bad" for prompt in prompts])
        failures = {"r": Failure("model_error", "bad", tuple(np.flatnonzero(bad).tolist()))} if bad.any() else {}
        values = np.where(bad, np.nan, np.array(self.batches[-1], np.float64))
        return Scores({"r": values}, {"r": ~bad}, failures, {"r/double": 2 * values})


def images(*values, size=2):
    return np.array(values, np.uint8)[:, None, None, None] * np.ones((1, size, size, 3), np.uint8)


def together(batch, *requests):
    """Answers to requests (images, text) that all wait before the worker is let go; and the worker."""

    async def go():
        batcher = MicroBatcher(Worker, batch)
        tasks = []
        for pixels, text in requests:
            tasks.append(asyncio.create_task(batcher.score(pixels, [Prompt(0, text)] * len(pixels))))
            await asyncio.sleep(0.01)
        batcher.worker.open.set()
        return await asyncio.gather(*tasks, return_exceptions=True), batcher.worker

    return asyncio.run(go())


def test_what_waits_is_scored_together_up_to_the_batch_and_everybody_gets_his_own():
    answers, worker = together(4, *[(images(*range(i, i + 1 + i % 3)), "p") for i in range(1, 8)])
    for i, answer in enumerate(answers, 1):
        np.testing.assert_array_equal(answer.values["r"], range(i, i + 1 + i % 3))
        np.testing.assert_array_equal(answer.details["r/double"], 2 * answer.values["r"])
    assert max(map(len, worker.batches)) <= 4 and len(worker.batches) < 7
    assert len(worker.threads) == 1


def test_the_first_to_come_waits_for_nobody_and_a_large_request_is_cut():
    answers, worker = together(4, (images(*range(10)), "p"))
    assert [len(batch) for batch in worker.batches] == [4, 4, 2]
    np.testing.assert_array_equal(answers[0].values["r"], range(10))


def test_images_of_different_sizes_are_not_scored_together():
    answers, worker = together(8, (images(0), "p"), (images(1), "p"), (images(2, size=3), "p"), (images(3), "p"))
    assert worker.batches == [[0], [1, 3], [2]]
    assert [answer.values["r"][0] for answer in answers] == [0, 1, 2, 3]


def test_nobody_pays_for_the_failure_of_another():
    for text in ("bad", "crash"):
        answers, worker = together(8, (images(0), "p"), (images(1), "p"), (images(2), text), (images(3), "p"))
        assert [answers[i].values["r"][0] for i in (0, 1, 3)] == [0, 1, 3]
        if text == "bad":
            assert answers[2].failures["r"] == Failure("model_error", "bad", (0,)) and len(worker.batches) == 2
        else:
            assert isinstance(answers[2], RuntimeError)


def test_a_request_that_its_caller_gave_up_is_not_scored():
    async def go():
        batcher = MicroBatcher(Worker, 1)
        tasks = [asyncio.create_task(batcher.score(images(i), [Prompt(0, "p")])) for i in range(3)]
        await asyncio.sleep(0.05)
        tasks[1].cancel()
        await asyncio.sleep(0)
        batcher.worker.open.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        return batcher.worker.batches

    assert asyncio.run(go()) == [[0], [2]]
