"""What every reward promises, asked of each: on tiny checkpoints where it reads files, else on the embedded world.

A NEW ONE: a line in GRADIENTS or OTHERS. Those with a gradient read files: their own test file has `write`, which saves
tiny ones in a folder, and `loaded`, which makes the reward from that folder and settings.
"""

import copy
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

from align_cluster.embedded import scene
from align_cluster.embedded.render import render
from align_cluster.rewards import REWARDS
from align_cluster.rewards.base import DifferentiableReward, Reward
from align_cluster.rewards.clip import Clip
from align_cluster.rewards.worker import RewardWorker
from align_cluster.types import Failure, Prompt

from ..cases import each
from .helpers import floats, prompts, refusal

TEXTS = ["a photo of a red circle", "A drawing of four STARS on a dark background", "a ring"]
RECORDS = [scene.prompts(task, "held_out")[1] for task in scene.TASKS]  # objects to count and colour, and words to read
LIGHT = {"positive": "on a light background", "negative": "on a dark background", "template": "{word} {prompt}"}


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
    sources: tuple[str, ...] = ()
    batch: float = 0.0
    same: float = 0.0
    exact: float = 0.0
    apart: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    reads_prompts: bool = True
    clamps: bool = True  # images, after they are scaled
    extra: str | None = None  # a package that it needs
    world: bool = False  # whether it reads pictures and records of the embedded world


GRADIENTS = [
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
]
OTHERS = [
    Case("geneval", world=True),
    Case("geneval", settings={"score": "mixed"}, world=True),
    Case("ocr", extra="rapidocr", world=True),
    Case("jpeg"),
    Case("jpeg", settings={"incompressible": True}),
    Case("sgp", batch=1e-5, same=1e-6, settings={"of": {"kind": "clip_score"}, **LIGHT}),
]
ELSEWHERE = {"http"}  # a service's reward: tests/serving and tests/system/test_reward_service.py ask it over HTTP
ALL = [case for case in GRADIENTS + OTHERS if not case.extra or find_spec(case.extra)]
SMOOTH = [case for case in ALL if case in GRADIENTS]


@pytest.fixture(scope="module")
def load(tmp_path_factory) -> Callable[..., Reward]:
    """Function (case, **settings) -> the loaded reward; its files are written once."""

    @cache
    def written(kind: str) -> tuple:
        own, folder = importlib.import_module(f".test_{kind}", __package__), tmp_path_factory.mktemp(kind)
        own.write(folder)
        return own, folder

    def make(case: Case, **settings: str) -> Reward:
        settings = case.settings | settings
        if case in GRADIENTS:
            own, folder = written(case.kind)
            return own.loaded(folder, **settings)
        reward = REWARDS[case.kind](REWARDS[case.kind].Config(**settings))
        reward.load("cpu", 1)
        return reward

    return make


@pytest.fixture(scope="module")
def loaded(load) -> Callable[[Case], Reward]:
    """Function case -> its reward, loaded once."""
    made: dict[int, Reward] = {}
    return lambda case: made.get(id(case)) or made.setdefault(id(case), load(case))


@pytest.fixture(scope="module")
def material(images) -> Callable[[Case], tuple[np.ndarray, list[Prompt]]]:
    """Function case -> images and prompts that it can score."""
    pictures = render(RECORDS, 2).permute(0, 2, 3, 1).numpy()
    records = [Prompt(i, record["prompt"], record) for i, record in enumerate(RECORDS)]
    return lambda case: (pictures, records) if case.world else (images, prompts(TEXTS))


def test_none_is_left_out():
    assert {case.kind for case in GRADIENTS + OTHERS} == REWARDS.keys() - ELSEWHERE
    differentiable = {kind for kind, reward in REWARDS.items() if issubclass(reward, DifferentiableReward)}
    assert {case.kind for case in GRADIENTS} == differentiable


@each("kind", sorted(REWARDS.keys() - ELSEWHERE))
def test_the_constructor_reads_nothing(kind):
    """The published files of the default settings are not here, and nothing can be fetched."""
    config = REWARDS[kind].Config()
    assert vars(REWARDS[kind](config)) == {"config": config} and config.kind == kind


@each("case", ALL)
def test_every_image_has_a_number_or_is_not_valid(loaded, material, case):
    images, asked = material(case)
    result = loaded(case).score(images, asked)
    assert result.values.shape == result.valid.shape == (len(images),)
    assert result.values.dtype == np.float64 and result.valid.dtype == bool
    assert result.valid.tolist() == [REWARDS[case.kind].judges(prompt) for prompt in asked]
    np.testing.assert_array_equal(np.isfinite(result.values), result.valid)
    assert len(set(result.values[result.valid])) > 1 or case.world  # what was rendered as asked is right
    assert all(column.shape == (len(images),) for column in result.details.values())
    low, high = loaded(case).bounds
    assert low is None or result.values[result.valid].min() >= low - 1e-6
    assert high is None or result.values[result.valid].max() <= high + 1e-6


@each("case", ALL)
def test_a_score_does_not_depend_on_the_batch(loaded, material, case):
    (images, asked), reward = material(case), loaded(case)
    batch, last = reward.score(images, asked).values, len(images) - 1
    singles = [reward.score(images[i : i + 1], asked[i : i + 1]).values[0] for i in range(len(images))]
    np.testing.assert_allclose(batch, singles, rtol=0, atol=case.batch)
    order = [*range(last, -1, -1), 0]  # the other way round, and one of them twice
    moved = reward.score(images[order], [asked[i] for i in order]).values
    np.testing.assert_allclose(moved, batch[order], rtol=0, atol=case.same)


@each("case", [case for case in ALL if not case.world])
def test_every_image_meets_its_own_prompt(loaded, images, case):
    reward = loaded(case)
    crossed = reward.score(images[[0, 1]], prompts([TEXTS[1], TEXTS[0]])).values
    straight = reward.score(images[:2], prompts(TEXTS[:2])).values
    assert (np.abs(crossed - straight[::-1]) > case.apart).all()  # the other image
    moved = np.abs(crossed - straight)  # the other prompt
    reads = case.reads_prompts and case.kind != "jpeg"
    assert (moved > case.apart).all() if reads else (moved <= case.same).all()


@each("case", ALL)
def test_what_breaks_is_a_typed_failure_and_no_number(loaded, material, case):
    """Images without pixels, scored by a run's worker, which goes on afterwards."""
    images, asked = material(case)
    worker = RewardWorker({})
    mine = worker.rewards["mine"] = copy.copy(loaded(case))
    policy = type(mine.config.on_failure)(retries=0)
    mine.config = mine.config.model_copy(update={"on_failure": policy})
    applies = [i for i, prompt in enumerate(asked) if REWARDS[case.kind].judges(prompt)]
    asked = [asked[i] for i in applies]
    scores = worker.score(images[applies][:, :0, :0], asked)
    failure = scores.failures["mine"]
    assert failure == Failure("model_error", failure.message, tuple(range(len(asked)))) and ": " in failure.message
    assert not scores.valid["mine"].any() and np.isnan(scores.values["mine"]).all()
    scores = worker.score(images[applies], asked)
    assert scores.failures == {} and scores.valid["mine"].all()


@each("case", SMOOTH)
def test_the_differentiable_score_is_the_score(loaded, images, case):
    reward = loaded(case)
    values = reward.differentiable(floats(images).requires_grad_(), prompts(TEXTS))
    assert values.shape == (3,) and values.dtype == torch.float32
    scores = reward.score(images, prompts(TEXTS)).values
    np.testing.assert_allclose(values.detach(), scores, rtol=0, atol=case.exact)


@each("case", SMOOTH)
def test_the_gradient_to_the_pixels_is_that_of_finite_differences(loaded, images, case):
    reward = loaded(case)
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


@each("case", SMOOTH)
def test_each_image_is_judged_under_texts_of_its_own_as_each_pair_alone_is(loaded, images, case):
    reward, pixels = loaded(case), floats(images).requires_grad_()
    texts = [[TEXTS[row], TEXTS[row - 1]] for row in range(3)]
    scores = reward.against(pixels, texts)
    assert scores.shape == (3, 2)
    for row, own in enumerate(texts):
        for place, text in enumerate(own):
            alone = reward.differentiable(pixels[row : row + 1], prompts([text]))
            torch.testing.assert_close(scores[row : row + 1, place], alone, rtol=1e-5, atol=1e-5)
    (slope,) = torch.autograd.grad(scores[0].sum(), pixels)
    assert slope[0].abs().max() > 0 and not slope[1:].any()


def parameters(reward: Reward) -> list[torch.nn.Parameter]:
    """Those of all networks that a reward holds, itself or in a Clip."""
    parts = [*vars(reward).values()]
    parts += [value for part in parts if isinstance(part, Clip) for value in vars(part).values()]
    found = [parameter for part in parts if isinstance(part, torch.nn.Module) for parameter in part.parameters()]
    assert found
    return found


@each("case", SMOOTH)
def test_the_callers_autocast_changes_nothing(loaded, images, case):
    plain = loaded(case).differentiable(floats(images), prompts(TEXTS))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loaded(case).differentiable(floats(images), prompts(TEXTS))
    torch.testing.assert_close(mixed, plain, rtol=0, atol=1e-6)


@each("case", ALL)
def test_a_run_can_ask_for_it(loaded, material, case):
    images, asked = material(case)
    assert type(loaded(case)) is REWARDS[case.kind]
    scores = RewardWorker({"mine": loaded(case).config}).score(images, asked)
    assert scores.failures == {}
    assert scores.valid["mine"].tolist() == [REWARDS[case.kind].judges(prompt) for prompt in asked]


@each("case", SMOOTH)
def test_any_prompt_will_do_for_one_with_a_gradient(case):
    assert REWARDS[case.kind].judges(Prompt(0, "a cat"))


@each("case", SMOOTH)
def test_what_is_not_there_is_one_sentence(load, tmp_path, case):
    for setting in case.sources:
        for source in (str(tmp_path), str(tmp_path / "nothing"), "nobody/nothing"):
            refusal(
                f"^rewards: {case.kind} .*cannot load .*{source}.*: give .*reach, ", load, case, **{setting: source}
            )


@each("case", [case for case in ALL if case.extra])
def test_a_missing_package_says_what_to_install(load, monkeypatch, case):
    load(case)  # it writes its files while the package is there
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, case.extra, None)
        refusal(rf"{case.extra}.*: pip install 'align-cluster\[rewards\]'", load, case)
