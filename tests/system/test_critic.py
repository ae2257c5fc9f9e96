"""Actor-critic runs on Ray: one result for any number of workers, the warm-up, and what is left behind."""

import json
import math
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest
from safetensors.numpy import load_file

from align_cluster.backbones.adapters import add_adapters
from align_cluster.backbones.critic import Critic
from align_cluster.backbones.sd3 import SD3
from align_cluster.cli import main
from align_cluster.config.check import check
from align_cluster.errors import UserError
from align_cluster.observe.metrics import describe
from align_cluster.observe.rundir import RunDir
from align_cluster.observe.sinks import read_jsonl

PPO = (
    *("rewards.geneval.weight=2", "rewards.clip.weight=-1", "rollout.group_size=2", "steps=3"),
    *(
        "algorithm.critic.width=32",
        "algorithm.critic.heads=4",
        "algorithm.critic_lr=3e-3",
        "learner.updates_per_step=2",
        "algorithm.critic_epochs=1",
        "algorithm.replay={images: 10, states: 2, minibatch: 2}",  # 2 updates a step; the oldest images go out
        "algorithm.critic_held_out=0",
    ),
)


@pytest.fixture(scope="module")
def job(tiny):
    return lambda *overrides: tiny("ppo", *PPO, "algorithm.warm_up.updates=2", *overrides)


@pytest.fixture(scope="module")
def done(job, train):
    return train(job("cluster.learners=1"))


@pytest.mark.slow
def test_one_and_two_samplers_end_in_the_same_lora_and_the_same_critic(job, train, done):
    other = train(job("cluster.learners=1", "cluster.samplers=1"))
    assert other.summary["lora_checksum"] == done.summary["lora_checksum"]
    ours, theirs = (load_file(RunDir(run.path).critic / "critic.safetensors") for run in (done, other))
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours) and ours.keys() == theirs.keys()


@pytest.mark.parametrize(
    "more",
    [
        pytest.param("backbone.precision=fp32", marks=pytest.mark.slow),  # both ranks have samples
        pytest.param("rollout.chunk=2", marks=pytest.mark.exhaustive),  # one rank pads
    ],
)
def test_two_learner_ranks_train_the_same_critic_up_to_rounding(job, train, more):
    runs = [train(job(f"cluster.learners={ranks}", more)) for ranks in (1, 2)]
    ours, theirs = (load_file(RunDir(run.path).critic / "critic.safetensors") for run in runs)
    fresh = SD3(job().backbone)
    actor = add_adapters(fresh, fresh.load_denoiser(), ("default", "critic"))
    start = Critic(fresh, actor, 2, job().algorithm.critic).state()

    def distance(one: dict, other: dict) -> float:
        return float(np.sqrt(sum(((np.asarray(one[name]) - np.asarray(other[name])) ** 2).sum() for name in ours)))

    assert distance(ours, theirs) < 0.02 * distance(ours, start)


def test_the_actor_waits_for_the_critic_and_begins_with_a_ratio_of_one(done):
    rows = read_jsonl(RunDir(done.path).metrics)
    assert [row["value/actor"] for row in rows] == [0, 1, 1]
    assert "train/loss" not in rows[0] and math.isfinite(rows[1]["train/loss"])
    assert all(math.isfinite(row["train/value_loss"]) and row["train/critic_grad_norm"] > 0 for row in rows)
    assert all(describe(name) for row in rows for name in row.keys() - {"step", "seconds"})
    assert [row["value/replay/images"] for row in rows] == [4, 8, 8]
    assert [row["value/replay/age"] for row in rows] == [0, 0.5, 0.5]
    assert {"value/clip/explained_variance/0.75-1", "value/clip/correlation/3", "advantage/step/0"} <= rows[2].keys()
    assert done.summary["self_check"] == {"max_abs_log_ratio": 0.0}


def test_a_run_leaves_its_critic_and_what_its_values_mean(done):
    facts = json.loads((RunDir(done.path).critic / "critic.json").read_text())
    assert facts["rewards"] == ["geneval", "clip"] and facts["critic"]["width"] == 32
    assert facts["moments"]["clip"]["count"] == 3 * 2 * 2 and facts["warm"]
    for name in facts["rewards"]:
        picture = ElementTree.parse(RunDir(done.path).critic / f"{name}.svg")
        dots = [use for use in picture.iter("{http://www.w3.org/2000/svg}use") if "opacity" in use.attrib["style"]]
        assert len(dots) == 2 * (3 * 2 * 2 + 1)  # two levels an image, and one of each in the legend
    weights = load_file(RunDir(done.path).critic / "critic.safetensors")
    assert weights["head.last.weight"].shape == (2, 32) and weights["head.last.weight"].any()


@pytest.mark.parametrize("mode", ["best_of_n", "smc", "guidance", "guided_best_of_n"])
def test_a_runs_folder_is_all_that_steering_needs(done, tmp_path, capsys, mode):
    folder = shutil.copytree(done.path, tmp_path / "elsewhere")
    settings = ["--set", "steer.n=2", "steer.prune_at=1"] if "best" in mode else []
    arguments = ["--prompt", "a photo of a red circle", "--count", "1", "--no-score", "--out", str(tmp_path / "out")]
    assert main(["sample", "--run", str(folder), *arguments, "--steer", mode, *settings]) == 0
    printed = capsys.readouterr().out
    (image,) = json.loads((tmp_path / "out" / "samples.json").read_text())["images"]
    assert set(image["expected"]) == {"geneval", "clip"} and np.isfinite(list(image["expected"].values())).all()
    assert f"{mode}: " in printed and "critic passes" in printed and "plain sampling: 4 actor passes" in printed


def test_one_image_a_prompt_is_enough(job, in_process):
    config = job(
        "rollout.group_size=1", "prompts_per_step=4", "learner.updates_per_step=1", "algorithm.warm_up.updates=0"
    )
    assert check(config) == []
    assert all(row["train/grad_norm"] > 0 for row in in_process(config).rows)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("learner.zero_stage=3", "learner.zero_stage is 3.*set it to 2 or less"),
        ("algorithm.critic.heads=5", "algorithm.critic.width is 32, which 5 heads cannot share"),
        ("rollout.window={kind: fraction, fraction: 0.5, choice: per_sample}", "rollout.window.choice is per_sample"),
        ("rollout.step.kind=euler", "rollout.step.kind is euler, which has no density"),
    ],
)
def test_what_a_critic_cannot_do_is_one_sentence(job, override, sentence):
    with pytest.raises(UserError, match=sentence):
        check(job(override))
