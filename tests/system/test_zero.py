"""The real DeepSpeed engine against a plain torch loop that shares nothing with it but the algorithm's loss."""

import pickle
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from align_cluster.algorithms import ALGORITHMS
from align_cluster.algorithms.base import Batch, Policy, RecordedSteps
from align_cluster.backbones.adapters import active_adapter, adapter_parameters, add_adapters
from align_cluster.backbones.sd3 import SD3
from align_cluster.learner.batching import rank_share, reduce_metrics
from align_cluster.rewards.clip_score import ClipScore
from align_cluster.rollouts.steps import FlowSde
from align_cluster.streams import hashed, stream
from align_cluster.types import Prompt
from align_cluster.weights import view

from ..cases import each
from .ranks import ranks

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("zero_worker.py")
WORKER = runpy.run_path(str(SCRIPT))
ONE_RANK = ["0:nft", "1:nft", "2:nft", "3:nft", "2:grpo", "2:srpo", "2:draft", "3:draft"]
TWO_RANKS = ["0:nft", "2:nft", "3:nft", "2:grpo", "2:srpo", "2:draft"]
CASES = [(case, 1) for case in ONE_RANK] + [(case, 2) for case in TWO_RANKS]
CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def left(tmp_path_factory, reference, preload) -> dict[tuple[str, int], list[list[dict]]]:
    """(case, world) -> for each rank, what each step left behind; after `reference`, which encodes the prompts."""
    folder = tmp_path_factory.mktemp("zero")
    with (
        ranks(preload, SCRIPT, 1, folder / "one", *ONE_RANK) as alone,
        ranks(preload, SCRIPT, 2, folder / "two", *TWO_RANKS) as both,
    ):
        assert [process.wait(timeout=900) for process in alone + both] == [0, 0, 0]
    files = {1: [folder / "one.0"], 2: [folder / "two.0", folder / "two.1"]}
    found = {world: [pickle.loads(path.read_bytes()) for path in paths] for world, paths in files.items()}
    return {(case, world): [rank[case] for rank in found[world]] for case, world in CASES}


class PlainPolicy(Policy):
    """The network without engine, guidance or micro-batches."""

    def __init__(self, backbone, denoiser, step, condition, count, reward):
        self.backbone, self.denoiser, self.step, self.reward = backbone, denoiser, step, reward
        self.sequence = torch.tensor(condition.sequence).expand(count, -1, -1)
        self.pooled = torch.tensor(condition.pooled).expand(count, -1)

    def velocity(self, x, sigma, adapter="default"):
        with torch.set_grad_enabled(adapter == "default"), active_adapter(self.denoiser, adapter):
            return self.backbone.velocity(self.denoiser, x, sigma, self.sequence, self.pooled)

    def rewards(self, latents, texts):
        images = (self.backbone.pixels(latents) / 2 + 0.5).clamp(0, 1)
        columns = [
            self.reward.differentiable(images, [Prompt(0, text) for text in own]) for own in zip(*texts, strict=True)
        ]
        return 10 * torch.stack(columns, 1)


def streams(record, step: int, update: int, inner_pass: int):
    """The documented random streams of a sample: a function of its seed and the moment."""

    def generators(purpose, shared=False):
        ends = purpose if shared else f"{purpose} {inner_pass}"
        return [stream(hashed(f"{seed} {step} {update} {ends}")) for seed in record.chunk.seeds]

    return generators


@pytest.fixture(scope="module")
def reference() -> dict[str, list[dict]]:
    """The same steps by hand: AdamW, clip_grad_norm_, an average over all valid samples and turns of an update."""
    return {algorithm: plain_run(WORKER["settings"](0, algorithm)) for algorithm in ("nft", "grpo", *WORKER["DIRECT"])}


def plain_run(config) -> list[dict]:
    algorithm = ALGORITHMS[config.algorithm.kind](config.algorithm)
    backbone = SD3(config.backbone)
    denoiser = add_adapters(backbone, backbone.load_denoiser(), algorithm.adapters)
    drawn, texts = WORKER["records"](config.algorithm.kind), WORKER["conditions"]()
    reward = ClipScore(ClipScore.Config())
    reward.load("cpu", 1)
    advantages, valid = WORKER["credit"]()
    parameters, settings = adapter_parameters(denoiser, "default"), config.optimizer
    optimizer = torch.optim.AdamW(parameters.values(), settings.lr, settings.betas, settings.eps, settings.weight_decay)
    average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    count, left = 0, []
    for step in range(config.steps):
        pieces, norms = WORKER["cut_step"](step), []
        inner_passes = algorithm.inner_passes(4, 2)
        for update in range(config.learner.updates_per_step):
            sources = sorted({piece.source for piece in pieces if piece.update == update})
            weight = sum(valid[source].sum() for source in sources) * inner_passes
            optimizer.zero_grad()
            for source in sources:
                record, keep = drawn[source], torch.from_numpy(valid[source])
                named = {"before": record.before, "after": record.after, "log_probs": record.log_probs}
                arrays = {name: torch.tensor(array) for name, array in named.items() if array is not None}
                for inner_pass in range(inner_passes):
                    policy = PlainPolicy(
                        backbone, denoiser, FlowSde(FlowSde.Config(), record.sigmas), texts[source], len(keep), reward
                    )
                    batch = Batch(
                        passes=(inner_pass,) * len(keep),
                        advantages=torch.from_numpy(advantages[source]),
                        x0=torch.tensor(record.x0),
                        sigmas=record.sigmas,
                        recorded=RecordedSteps(indices=torch.from_numpy(record.indices), **arrays),
                        generators=streams(record, step, update, inner_pass),
                        prompts=tuple(prompt.text for prompt in record.chunk.prompts),
                        noises=record.chunk.noises,
                        update=count,
                    )
                    loss, _ = algorithm.loss(policy, batch)
                    (loss[keep].sum() / weight).backward()
            norms.append(torch.nn.utils.clip_grad_norm_(parameters.values(), settings.max_grad_norm).item())
            # Four updates in all: flat for the first half, then evenly down to zero but for the floor.
            optimizer.param_groups[0]["lr"] = settings.lr * {0: 1, 1: 1, 2: 1, 3: 0.5}[count]
            optimizer.step()
            count += 1
            decay = min((1 + count) / (10 + count), 0.9)
            average = {name: decay * value + (1 - decay) * parameters[name].detach() for name, value in average.items()}
        decay = algorithm.old_decay(count)
        if decay is not None:
            with torch.no_grad():
                for name, old in adapter_parameters(denoiser, "old").items():
                    old.copy_(decay * old + (1 - decay) * parameters[name])
        behaviour = adapter_parameters(denoiser, algorithm.behaviour)
        left.append(
            {
                "default": {name: p.detach().clone().numpy() for name, p in parameters.items()},
                "behaviour": {name: p.detach().clone().numpy() for name, p in behaviour.items()},
                "evaluation": {name: value.clone().numpy() for name, value in average.items()},
                "norms": norms,
            }
        )
    return left


def published(entry: dict, source: str) -> dict[str, np.ndarray]:
    manifest, buffer = entry["published"][source]
    return {tensor.name: view(buffer, tensor) for tensor in manifest.tensors}


def assert_close(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert first.keys() == second.keys() and first
    for name, value in first.items():
        np.testing.assert_allclose(value, second[name], **CLOSE, err_msg=name)


def test_the_job_exercises_padding_masks_clipping_and_both_signs(reference):
    config = WORKER["settings"](2, "nft")
    pieces = WORKER["cut_step"](0)
    shares = [rank_share(pieces, rank, 2)[0] for rank in range(2)]
    assert sum(len(mine) for mine in shares) > len(pieces)
    advantages, valid = WORKER["credit"]()
    assert min(a.min() for a in advantages) < 0 < max(a.max() for a in advantages)
    assert not all(v.all() for v in valid)
    for steps in reference.values():
        assert min(norm for step in steps for norm in step["norms"]) > config.optimizer.max_grad_norm


@each(("case", "world"), CASES)
def test_updates_equal_plain_adamw_with_clipping(left, reference, case, world):
    for rank in left[case, world]:
        for entry, expected in zip(rank, reference[case[2:]], strict=False):
            assert_close(entry["default"], expected["default"])


@each(("case", "world"), CASES)
def test_the_old_adapter_and_the_average_are_published_as_computed_by_hand(left, reference, case, world):
    for version, (entry, expected) in enumerate(zip(left[case, world][0], reference[case[2:]], strict=False), start=1):
        assert entry["published"]["behaviour"][0].version == version
        assert_close(published(entry, "behaviour"), expected["behaviour"])
        assert_close(published(entry, "evaluation"), expected["evaluation"])


@each("case", TWO_RANKS)
def test_two_ranks_equal_one(left, case):
    for one, two in zip(left[case, 1][0], left[case, 2][0], strict=True):
        assert_close(one["default"], two["default"])
    assert all(entry["published"]["behaviour"] == (None, None) for entry in left[case, 2][1])
    for first, second in zip(*left[case, 2], strict=True):
        for name, value in first["default"].items():
            np.testing.assert_array_equal(value, second["default"][name])


@each("case", ONE_RANK[1:4])
def test_every_stage_publishes_the_same_buffer(left, case):
    for entry, other in zip(left["0:nft", 1][0], left[case, 1][0], strict=True):
        for source in ("behaviour", "evaluation"):
            (manifest, buffer), (manifest2, buffer2) = entry["published"][source], other["published"][source]
            assert manifest.tensors == manifest2.tensors and manifest.nbytes == manifest2.nbytes
            np.testing.assert_allclose(buffer.view(np.float32), buffer2.view(np.float32), **CLOSE)


@each(("case", "world"), CASES)
def test_metrics_are_means_over_valid_samples_and_the_norm_is_that_before_clipping(left, reference, case, world):
    first = reduce_metrics([rank[0]["metrics"] for rank in left[case, world]])
    alone = reduce_metrics([rank[0]["metrics"] for rank in left["2" + case[1:], 1]])
    for name in first.keys() - {"seconds"}:
        assert first[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-6), name
    norms = reference[case[2:]][0]["norms"]
    assert first["grad_norm"] == pytest.approx((np.mean(norms), max(norms)), rel=1e-4)
    assert first["lr"] == pytest.approx((2e-3, 2e-3))


@each("world", [1, 2])
def test_before_the_first_update_the_ratio_is_one_and_after_it_is_not(left, world):
    metrics = reduce_metrics([rank[0]["metrics"] for rank in left["2:grpo", world]])
    assert metrics["first_log_ratio"][1] < 1e-6 and metrics["log_ratio"][1] > 1e-4


@each(("case", "world"), CASES)
def test_a_loss_or_a_gradient_that_is_not_finite_is_skipped_and_counted_and_the_next_update_is_sound(left, case, world):
    for rank in left[case, world]:
        _, before, loss, gradient, sound, _ = rank
        for after in (loss, gradient):
            assert after["metrics"]["skipped"][0] == 2 and "grad_norm" not in after["metrics"]
            for name, value in before["default"].items():
                np.testing.assert_array_equal(after["default"][name], value)
        assert sound["metrics"]["skipped"][0] == 0 and np.isfinite(sound["metrics"]["grad_norm"][0])
        assert all(np.isfinite(value).all() for value in sound["default"].values())
        assert any((sound["default"][name] != value).any() for name, value in before["default"].items())
    _, before, *skipped, _, _ = left[case, world][0]
    for after in skipped:
        for source in ("behaviour", "evaluation"):
            np.testing.assert_array_equal(before["published"][source][1], after["published"][source][1])


@each(("case", "world"), CASES)
def test_an_update_whose_samples_are_all_masked_changes_nothing(left, case, world):
    """AdamW has momentum and weight decay, which would move the weights without a gradient."""
    for rank in left[case, world]:
        *_, before, masked = rank
        assert masked["metrics"]["empty"][0] == 2 and "grad_norm" not in masked["metrics"]
        for name, value in before["default"].items():
            np.testing.assert_array_equal(masked["default"][name], value)
        for source in ("behaviour", "evaluation") if before["published"]["behaviour"][0] else ():
            np.testing.assert_array_equal(before["published"][source][1], masked["published"][source][1])
