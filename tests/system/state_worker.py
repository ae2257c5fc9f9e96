"""One rank that saves, or takes up, a learner's state, started by test_learner_state.py:

    state_worker.py RANK WORLD PORT FOLDER JOB...

A JOB is "save:<stage>:<algorithm>" or "load:<stage>:<algorithm>:<name of the saved state>"; rank 0 pickles what it saw
to FOLDER/<stage>-<world>-<algorithm>, for load with "-from-<name>" behind it.
"""

import pickle
import runpy
import sys
from pathlib import Path

import numpy as np
import torch

from align_cluster.learner.batching import TrainingChunk, make_micro_batches, rank_work

ZERO = runpy.run_path(str(Path(__file__).with_name("zero_worker.py")))


class Job:
    """A real learner on the made-up records of zero_worker.py."""

    def __init__(self, stage: int, algorithm: str, rank: int, world: int, port: int) -> None:
        from align_cluster.learner.worker import Learner

        plain = ZERO["settings"](stage, "nft" if algorithm == "nft" else "grpo")
        config = plain.model_dump() | {"steps": 3}
        if algorithm == "ppo":
            config["algorithm"] = {"kind": "ppo", "critic": {"width": 16, "heads": 2}, "critic_lr": 1e-3}
        config["backbone"]["lora"] = {"rank": 3, "alpha": 3}  # parts of odd sizes: stage 3 has to pad
        self.config = type(plain).model_validate(config)
        self.rank, self.world = rank, world
        self.drawn, self.texts = ZERO["records"]("nft"), ZERO["conditions"]()
        self.learner = Learner(self.config.learner_setup, rank, world, "127.0.0.1", port)

    def step(self, step: int) -> dict:
        pieces = self.cut(step)
        chunks = [TrainingChunk(record, ZERO["texts_of"](self.texts)) for record in self.drawn]
        return self.learner.update(rank_work(step, pieces, chunks, rank=self.rank, world=self.world))

    def cut(self, step: int) -> list:
        if not self.learner.critic:
            return ZERO["cut_step"](step)
        advantages, valid = ZERO["credit"]()
        advantages = [np.stack([column, -column], 1) for column in advantages]
        targets = {name: [array[..., None] for array in advantages] for name in ("returns", "values")}
        cut = {"bounds": ZERO["bounds"](step), "size": ZERO["MICRO_BATCH"]}
        return make_micro_batches(advantages, valid, targets=targets, **cut)


def main() -> None:
    torch.set_num_threads(1)
    rank, world, port = (int(value) for value in sys.argv[1:4])
    folder = Path(sys.argv[4])
    for name in sys.argv[5:]:
        kind, stage, algorithm, *saved = name.split(":")
        job = Job(int(stage), algorithm, rank, world, port)
        if kind == "save":
            job.step(0)
            job.step(1)
            before, label = job.learner.state(), f"{stage}-{world}-{algorithm}"
        else:
            job.step(0)  # what it did before does not matter
            job.learner.restore(pickle.loads((folder / saved[0]).read_bytes())[0])
            before, label = job.learner.state(), f"{stage}-{world}-{algorithm}-from-{saved[0]}"
        job.step(2)
        after = job.learner.state()
        if rank == 0:
            (folder / label).write_bytes(pickle.dumps((before, after)))


if __name__ == "__main__":
    main()
