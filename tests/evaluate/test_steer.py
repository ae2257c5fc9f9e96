"""`sample --steer` on a run with a critic, as `train` leaves it: the embedded pipeline, with random LoRA and critic."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from align_cluster.backbones.adapters import add_adapters
from align_cluster.backbones.critic import Critic
from align_cluster.backbones.sd3 import SD3
from align_cluster.cli import main
from align_cluster.config.load import dump, load
from align_cluster.files import write_text
from align_cluster.loop.critic_advantages import CriticAdvantageEstimator, save_critic
from align_cluster.observe.rundir import RunDir
from align_cluster.rollouts.denoise import initial_noise
from align_cluster.rollouts.guidance import TextBatch
from align_cluster.streams import stream

from ..backbones.contract import random_state
from ..backbones.test_critic import shake
from .conftest import TINY

TEXT = "a photo of a red circle"
PPO = (
    *("name=ppo", "algorithm.kind=ppo", "algorithm.critic={width: 32, heads: 4}", "algorithm.warm_up.updates=0"),
    *("backbone.precision=fp32", "backbone.lora={rank: 4, alpha: 12}", "evaluate.steps=3"),
    *("rewards.geneval.weight=2", "rewards.clip.weight=-1"),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(run folder, its critic in memory)."""
    config = load(TINY, PPO)
    run = RunDir.create(tmp_path_factory.mktemp("runs"), config.name)
    write_text(run.config, dump(config))
    backbone = SD3(config.backbone)
    actor = add_adapters(backbone, backbone.load_denoiser(), ("default", "critic"))
    critic = Critic(backbone, actor, 2, config.algorithm.critic)
    shake(critic)
    backbone.save_lora(random_state(actor, 0.1), run.lora)
    estimator = CriticAdvantageEstimator(config)
    estimator.moments["geneval"].observe(np.array([0.2, 0.8, 0.8]))
    estimator.moments["clip"].observe(np.array([0.3, 0.5]))
    save_critic(run, config, {name: value.numpy() for name, value in critic.state().items()}, estimator)
    return run.path, critic


@pytest.fixture
def run(made):
    return made[0]


@pytest.fixture
def draw(run, tmp_path, capsys):
    """Function (folder, *arguments) -> (samples.json, images, what was printed)."""
    include = [{"class": "circle", "count": 1, "color": "red"}]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": TEXT, "tag": "colors", "include": include, "exclude": []}) + "\n")

    def go(folder, *arguments, source=("--prompts", str(prompts))):
        assert main(["sample", "--run", str(run), *source, "--out", str(tmp_path / folder), *arguments]) == 0
        facts = json.loads((tmp_path / folder / "samples.json").read_text())
        images = [np.asarray(Image.open(tmp_path / folder / image["file"])) for image in facts["images"]]
        return facts, np.stack(images), capsys.readouterr().out

    return go


def test_guidance_of_scale_zero_draws_the_images_of_plain_sampling_and_says_what_it_cost(draw):
    plain, images, printed = draw("plain", "--count", "3", "--no-score", "--compare", "base")
    assert "steer" not in plain and "passes" not in printed
    arguments = ("--count", "3", "--no-score", "--compare", "base", "--steer", "guidance", "--set")
    zero, same, printed = draw("zero", *arguments, "steer.scale=0")
    assert np.array_equal(same, images)
    assert [one["model"] for one in zero["images"]] == ["base"] * 3 + ["steered"] * 3
    guided = sum(0.2 <= sigma <= 0.95 for sigma in SD3(SD3.Config()).sigmas(3)[:-1]) * 3
    assert zero["steer"]["compute"] == {"actor": 9, "critic": guided, "critic_backward": guided, "images": 3}
    assert zero["steer"]["plain"] == {"actor": 9, "critic": 0, "critic_backward": 0, "images": 3}
    assert f"guidance: 9 actor passes, {guided} critic passes, {guided} passes back through the critic" in printed
    assert "plain sampling: 9 actor passes, 3 images decoded" in printed
    other = draw("other", *arguments, "steer.scale=50", "steer.clip=1")[1]
    assert np.array_equal(other[:3], images[:3]) and not np.array_equal(other[3:], images[3:])


def test_several_prompts_are_steered_each_under_its_own_text(draw):
    two = ("--prompt", TEXT, "--prompt", "a photo of two blue squares")
    plain = draw("plain", "--count", "3", "--no-score", source=two)[1]
    zero, same, _ = draw(
        "zero", "--count", "3", "--no-score", "--steer", "guidance", "--set", "steer.scale=0", source=two
    )
    assert [image["prompt"] for image in zero["images"]] == [two[1]] * 3 + [two[3]] * 3
    assert np.abs(same.astype(int) - plain).max() <= 2  # in a batch of one prompt's, not of all six
    assert np.abs(plain[:3].astype(int) - plain[3:]).max() > 50


def test_best_of_n_keeps_the_best_of_the_images_that_plain_sampling_draws(draw):
    plain, images, _ = draw("plain", "--count", "8", "--guidance", "3")
    best, kept, _ = draw("best", "--count", "2", "--guidance", "3", "--steer", "best_of_n", "--set", "steer.n=4")
    scores = [one["scores"] for one in plain["images"]]
    totals = np.array(
        [2 * (one["geneval"] - 0.6) / np.std([0.2, 0.8, 0.8]) - (one["clip"] - 0.4) / 0.1 for one in scores]
    )
    for place, group in enumerate((totals[:4], totals[4:])):
        chosen = 4 * place + int(group.argmax())
        assert best["images"][place]["seed"] == plain["images"][chosen]["seed"]
        assert np.abs(kept[place].astype(int) - images[chosen]).max() <= 2  # in a batch of 4, not of 8
    assert best["steer"]["compute"] == {"actor": 2 * 4 * 3 * 2, "critic": 0, "critic_backward": 0, "images": 8}
    assert best["steer"]["plain"]["actor"] == 2 * 3 * 2


def test_pruning_on_the_first_noise_keeps_what_the_critic_expects_most_of_and_says_it_in_the_rewards_units(draw, made):
    settings = ("steer.n=5", "steer.prune_at=0")
    facts, _, _ = draw("pruned", "--count", "1", "--steer", "best_of_n", "--set", *settings, source=("--prompt", TEXT))
    plain, _, _ = draw("plain", "--count", "5", "--no-score", "--steps", "1")
    seeds, critic = [one["seed"] for one in plain["images"]], made[1]
    text = TextBatch.build(critic.backbone.encode([TEXT]) * 5, None, torch.device("cpu"))
    noise = initial_noise([stream(seed) for seed in seeds], critic.backbone.latent_shape)
    with torch.no_grad():
        heads = critic(noise, torch.ones(5), text.sequence, text.pooled).numpy()
    chosen = int((2 * heads[:, 0] - heads[:, 1]).argmax())
    (image,) = facts["images"]
    assert image["seed"] == seeds[chosen] and image["expected"]["clip"] == pytest.approx(0.4 + 0.1 * heads[chosen, 1])
    assert image["expected"]["geneval"] == pytest.approx(0.6 + np.std([0.2, 0.8, 0.8]) * heads[chosen, 0], rel=1e-4)
    assert facts["steer"]["compute"] == {"actor": 3, "critic": 5, "critic_backward": 0, "images": 1}


def test_smc_takes_the_runs_own_noisy_step_and_tells_its_way(draw):
    settings = ("--steer", "smc", "--set", "steer.n=3", "steer.strength=200")
    facts, images, _ = draw("smc", "--count", "2", *settings)
    assert facts["steer"]["settings"]["step"]["kind"] == "flow_sde" and images.shape == (2, 48, 48, 3)
    assert facts["steer"]["compute"] == {"actor": 18, "critic": 18, "critic_backward": 0, "images": 6}
    for image in facts["images"]:
        assert image["effective_size"][0] == pytest.approx(3) and len(image["effective_size"]) == 4
        assert image["resampled"] and set(image["resampled"]) <= {1, 2}
    assert np.array_equal(draw("again", "--count", "2", *settings)[1], images)


def test_guided_best_of_n_prunes_in_between_and_a_noisy_step_is_guided_too(draw):
    settings = ("steer.n=4", "steer.prune_at=2", "steer.keep=2", "steer.step.kind=cps")
    facts, _, _ = draw("both", "--count", "1", "--steer", "guided_best_of_n", "--set", *settings)
    levels = SD3(SD3.Config()).sigmas(3)
    guided = [k for k in range(3) if 0.2 <= levels[k] <= 0.95]
    passes = sum(4 if k < 2 else 2 for k in guided)
    assert facts["steer"]["compute"] == {
        "actor": 4 * 2 + 2,
        "critic": passes + 4,
        "critic_backward": passes,
        "images": 2,
    }


def test_an_image_that_is_not_finite_is_never_chosen_where_another_is_finite(draw, monkeypatch):
    real = SD3.velocity

    def broken(self, denoiser, x, *rest):
        output = real(self, denoiser, x, *rest)
        return output.where((torch.arange(len(x)) == len(x) - 1).view(-1, 1, 1, 1), torch.nan)

    monkeypatch.setattr(SD3, "velocity", broken)
    for mode, settings in (("best_of_n", ()), ("best_of_n", ("steer.prune_at=1", "steer.keep=1")), ("smc", ())):
        folder = f"{mode}{len(settings)}"
        facts, images, _ = draw(folder, "--count", "1", "--steer", mode, "--set", "steer.n=4", *settings)
        assert images.any() and "non_finite" not in facts["images"][0]
        assert mode == "best_of_n" and not settings or facts["images"][0]["not_finite"]
    facts, images, _ = draw("all", "--count", "4", "--steer", "guidance")
    assert [one.get("non_finite", False) for one in facts["images"]] == [True, True, True, False]
    assert not images[:3].any() and images[3].any()
    monkeypatch.setattr(SD3, "velocity", lambda self, denoiser, x, *rest: torch.full_like(x, torch.nan))
    facts, images, _ = draw("none", "--count", "1", "--steer", "best_of_n", "--set", "steer.n=2")
    assert facts["images"][0]["non_finite"] and not images.any()


def test_a_critic_that_reads_the_bare_base_steers_too(run, draw, tmp_path):
    other = shutil.copytree(run, tmp_path / "frozen")
    facts = json.loads((other / "critic" / "critic.json").read_text())
    facts["critic"]["features"] = "frozen"
    (other / "critic" / "critic.json").write_text(json.dumps(facts))
    arguments = ["--prompt", TEXT, "--count", "1", "--steer", "smc", "--out", str(tmp_path / "out")]
    assert main(["sample", str(other), *arguments]) == 2  # whose file has an adapter too many

    from safetensors.torch import load_file, save_file

    state = load_file(other / "critic" / "critic.safetensors")
    heads = {name: value for name, value in state.items() if name.startswith("head.")}
    save_file(heads, other / "critic" / "critic.safetensors")
    assert main(["sample", str(other), *arguments]) == 0


REFUSED = [
    (["--steer", "bon"], "steer.kind is 'bon'; it must be one of best_of_n, smc, guidance, guided_best_of_n"),
    (["--steer", "smc", "--set", "steer.n=0"], "steer.n is 0; it must be above 0"),
    (["--steer", "smc", "--set", "steer.nn=4"], "steer.nn is no setting; did you mean steer.n?"),
    (["--set", "steer.n=4"], "--set steer.n=4 needs --steer"),
    (
        ["--steer", "smc", "--set", "steer.step.kind=euler"],
        "smc cannot use steer.step.kind euler, which has no den",
    ),
    (["--steer", "guidance", "--set", "steer.step.kind=ddim"], "is not for a network that predicts flow"),
    (["--steer", "guidance", "--set", "steer.step.kind=dpm2"], "steer.step.kind is 'dpm2'"),
    (["--steer", "smc", "--set", "rewards.clip.role=monitor"], "judges geneval and clip, and the rewards that are"),
    (["--steer", "best_of_n", "--no-score"], "no reward judges 'a photo of a red circle'"),
    (["--steer", "best_of_n", "--set", "steer.prune_at=3"], "with steps 0 to 2"),
]


def test_what_cannot_be_steered_is_one_sentence_and_no_folder(run, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out"), "--prompt", TEXT]
    for arguments, words in REFUSED:
        assert main(["sample", "--run", str(run), *out, *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_run_without_a_critic_or_with_a_broken_one_is_refused(run, tmp_path, capsys):
    other = Path(shutil.copytree(run, tmp_path / "run"))
    arguments = ["sample", "--run", str(other), "--prompt", TEXT, "--steer", "guidance", "--out", str(tmp_path / "out")]
    (other / "critic" / "critic.safetensors").write_bytes(b"nothing")
    assert main(arguments) == 2
    assert "critic.safetensors cannot be read" in capsys.readouterr().err
    critic = json.loads((other / "critic" / "critic.json").read_text())
    for broken in ([], {}, 3, critic | {"rewards": 3}, critic | {"moments": {}}, critic | {"critic": {"width": -1}}):
        (other / "critic" / "critic.json").write_text(json.dumps(broken))
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert "critic.json is not what a run wrote" in error and error.count("\n") == 1
    shutil.rmtree(other / "critic")
    assert main(arguments) == 2
    assert f"--steer needs a critic, and {other} has none" in capsys.readouterr().err
