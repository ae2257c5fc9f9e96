"""What every DifferentiableReward promises, asked of each with a tiny checkpoint.

A NEW ONE: a line in CASES. Its own test file has `write`, which saves its checkpoint in a folder, and `loaded`, which
makes the reward from that folder and settings.
"""

import importlib
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import pytest
import torch

from align_cluster.rewards import REWARDS
from align_cluster.rewards.base import DifferentiableReward
from align_cluster.rewards.clip import Clip
from align_cluster.rewards.worker import RewardWorker
from align_cluster.types import Prompt

from .helpers import floats, prompts, refusal

TEXTS = ["a photo of a red circle", "A drawing of four STARS on a dark background", "a ring"]


@dataclass(frozen=True)
class Case:
    """A reward with settings, and how near its scores are to each other.

    sources   settings that say where files are
    batch     distance of a score from its image's own without a batch
    same      distance of scores of the same image and prompt in other places of a batch
    exact     distance of the differentiable score from the score
    apart     what other images, and other prompts where they are read, differ by at least
    """

    kind: str
    sources: tuple[str, ...]
    batch: float
    same: float
    exact: float
    apart: float
    settings: dict[str, str] = field(default_factory=dict)
    reads_prompts: bool = True
    clamps: bool = True  # images, after they are scaled
    extra: str = "torch"  # a package that it needs


CASES = (
    Case("clip_score", ("path",), 1e-5, 1e-6, 1e-6, 5e-4),
    Case("clip_score", (), 1e-4, 1e-5, 1e-5, 5e-4, {"scale": "srpo"}),
    Case("open_clip_score", ("path",), 1e-5, 1e-6, 1e-6, 1e-3, extra="open_clip"),
    Case("pickscore", ("path", "processor"), 1e-4, 1e-4, 1e-4, 1e-2),
    Case("pickscore", (), 1e-5, 1e-5, 1e-5, 4e-4, {"scale": "flow_grpo"}),
    Case("pickscore", (), 1e-5, 1e-5, 1e-5, 4e-4, {"scale": "srpo"}),
    Case("pickscore", (), 1e-5, 1e-6, 1e-6, 1e-4, {"scale": "cosine"}),
    Case("hps", ("path",), 1e-5, 1e-6, 1e-5, 1e-3, clamps=False, extra="open_clip"),
    Case("image_reward", ("path", "tokenizer"), 1e-4, 1e-5, 1e-5, 1e-2),
    Case("aesthetic", ("encoder", "head"), 1e-4, 1e-5, 1e-5, 1e-2, {"version": "v1"}, reads_prompts=False),
    Case("aesthetic", ("encoder", "head"), 1e-4, 1e-5, 1e-5, 1e-2, {"version": "v2.5"}, reads_prompts=False),
)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join((case.kind, *case.settings.values())))
def case(request):
    pytest.importorskip(request.param.extra, reason="the extra 'rewards' is not installed")
    return request.param


@pytest.fixture(scope="module")
def load(case, checkpoint):
    """A function from settings to the loaded reward."""
    own, folder = checkpoint(case.kind)
    return lambda **settings: own.loaded(folder, **{**case.settings, **settings})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A function from a kind to its test file and a folder that it wrote."""

    @cache
    def written(kind):
        own, folder = importlib.import_module(f".test_{kind}", __package__), tmp_path_factory.mktemp(kind)
        own.write(folder)
        return own, folder

    return written


@pytest.fixture(scope="module")
def reward(load):
    return load()


def test_none_is_left_out():
    differentiable = {kind for kind, reward in REWARDS.items() if issubclass(reward, DifferentiableReward)}
    assert {case.kind for case in CASES} == differentiable


def test_a_batch_scores_as_its_images_do_one_by_one(case, reward, images):
    batch = reward.score(images, prompts(TEXTS)).values
    singles = [reward.score(images[i : i + 1], prompts(TEXTS[i : i + 1])).values[0] for i in range(3)]
    np.testing.assert_allclose(batch, singles, rtol=0, atol=case.batch)


def test_the_same_image_twice_scores_the_same(case, reward, images):
    first, second = reward.score(images[[0, 0]], prompts([TEXTS[0]] * 2)).values
    assert first == pytest.approx(second, rel=0, abs=case.same)


def test_every_image_meets_its_own_prompt(case, reward, images):
    crossed = reward.score(images[[0, 1, 0]], prompts([TEXTS[1], TEXTS[0], TEXTS[0]])).values
    straight = reward.score(images[:2], prompts(TEXTS[:2])).values
    assert crossed[2] == pytest.approx(straight[0], rel=0, abs=case.same)
    assert (np.abs(crossed[:2] - straight[::-1]) > case.apart).all()  # the other image
    moved = np.abs(crossed[:2] - straight)  # the other prompt
    assert (moved > case.apart).all() if case.reads_prompts else (moved <= case.same).all()


def test_the_differentiable_score_is_the_score(case, reward, images):
    values = reward.differentiable(floats(images).requires_grad_(), prompts(TEXTS))
    assert values.shape == (3,) and values.dtype == torch.float32
    scores = reward.score(images, prompts(TEXTS)).values
    np.testing.assert_allclose(values.detach(), scores, rtol=0, atol=case.exact)


def test_the_gradient_to_the_pixels_is_that_of_finite_differences(case, reward, images):
    pixels = 0.2 + 0.6 * floats(images) if case.clamps else floats(images)  # room for the steps
    pixels.requires_grad_()
    reward.differentiable(pixels, prompts(TEXTS)).sum().backward()
    assert all(parameter.grad is None for parameter in parameters(reward))
    assert (pixels.grad.flatten(1).norm(dim=1) > 0).all()
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        step = 3e-3 * torch.randn(pixels.shape, generator=generator)
        with torch.no_grad():
            ahead, behind = (reward.differentiable(pixels + sign * step, prompts(TEXTS)) for sign in (1, -1))
        slopes = (pixels.grad * step).flatten(1).sum(1)
        assert slopes.abs().max() > case.apart / 10
        torch.testing.assert_close((ahead - behind) / 2, slopes, rtol=0, atol=0.02 * slopes.abs().max().item())


def parameters(reward):
    """Those of all networks that a reward holds, itself or in a Clip."""
    parts = [*vars(reward).values()]
    parts += [value for part in parts if isinstance(part, Clip) for value in vars(part).values()]
    found = [parameter for part in parts if isinstance(part, torch.nn.Module) for parameter in part.parameters()]
    assert found
    return found


def test_the_callers_autocast_changes_nothing(reward, images):
    plain = reward.differentiable(floats(images), prompts(TEXTS))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(reward.differentiable(floats(images), prompts(TEXTS)), plain, rtol=0, atol=1e-6)


def test_a_run_can_ask_for_it_and_any_prompt_will_do(case, reward, images):
    assert type(reward) is REWARDS[case.kind]
    scores = RewardWorker({"mine": reward.config}).score(images, prompts(TEXTS))
    assert scores.failures == {} and scores.valid["mine"].all() and np.isfinite(scores.values["mine"]).all()
    assert REWARDS[case.kind].judges(Prompt(0, "a cat"))


def test_what_is_not_there_is_one_sentence(case, load, tmp_path):
    for setting in case.sources:
        for source in (str(tmp_path), str(tmp_path / "nothing"), "nobody/nothing"):
            refusal(f"^rewards: {case.kind} .*cannot load .*{source}.*: give .*reach, ", load, **{setting: source})
