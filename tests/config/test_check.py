import json
from pathlib import Path

import pytest

from align_cluster.config.check import check
from align_cluster.config.load import load
from align_cluster.types import UserError

ROOT = Path(__file__).parents[2]

GENEVAL = ["backbone.path=a/b", "prompts.kind=geneval", "prompts.count=500", "rewards.judge.kind=clip_score"]
GENEVAL += ["evaluate.prompts.kind=geneval", "evaluate.prompts.split=held_out", "evaluate.prompts.count=300"]

PROBLEMS = [
    (["rollout.chunk=5"], ["rollout.chunk is 5", "does not divide rollout.group_size 6", "3 or 6"]),
    (["rollout.chunk=12"], ["rollout.chunk is 12", "rollout.group_size 6", "3 or 6"]),
    (["learner.micro_batch=12"], ["learner.micro_batch is 12", "chunks of 6", "at most 6"]),
    (["rollout.chunk=2", "learner.micro_batch=3"], ["learner.micro_batch is 3", "chunks of 2"]),
    (["learner.updates_per_step=5"], ["learner.updates_per_step is 5", "4 chunks", "at most 4"]),
    (["rollout.group_size=1"], ["rollout.group_size is 1", "2 or more"]),
    (["algorithm.kind=grpo", "rollout.step.kind=euler"], ["rollout.step.kind is euler", "grpo", "flow_sde"]),
    (["algorithm.kind=grpo", "rollout.steps=1"], ["rollout.steps is 1", "2 or more"]),
    (["algorithm.timesteps=9"], ["algorithm.timesteps is 9", "4 noise levels", "at most 4"]),
    (["rewards.judge.role=monitor"], ["nothing to train on", "rewards.judge.role to train"]),
    (["rewards.judge.weight=0"], ["weight 0", "rewards.judge.weight"]),
    (["backbone.path=./missing"], ["backbone.path is ./missing", "hub id"]),
    (["backbone.path=embeded"], ["backbone.path is embeded", "embedded"]),
    (["backbone.path=tests"], ["backbone.path is tests", "model_index.json"]),
    (["prompts.kind=geneval"], ["prompts.kind is geneval", "embedded model never saw", "set it to embedded"]),
    (["evaluate.count=1000"], ["evaluate.count is 1000", "evaluate.prompts has", "at most"]),
    (["evaluate.grid_prompts=1000"], ["evaluate.grid_prompts is 1000", "at most"]),
    (
        ["prompts_per_step=5000", "rollout.group_size=2"],
        ["prompts_per_step is 5000", "prompts has 1167", "at most 1167"],
    ),
    (["evaluate.prompts.split=train"], ["evaluate.prompts: 1167 prompts are trained on", "split to held_out"]),
    ([*GENEVAL, "prompts.split=all"], ["prompts are trained on as well", "split to held_out"]),
    (["prompts.tasks=[ocr]"], ["rewards.judge judges none of the training prompts", "include"]),
    (["rewards.judge.kind=ocr"], ["rewards.judge judges none of the training prompts", "quote text"]),
    ([*GENEVAL, "rewards.judge.kind=geneval"], ["embedded detector knows circle", "clip_score"]),
]


@pytest.mark.parametrize(("overrides", "parts"), PROBLEMS, ids=[p[1][0] for p in PROBLEMS])
def test_a_combination_that_cannot_work_gives_one_sentence_with_the_remedy(run_config, overrides, parts, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as caught:
        check(run_config(*overrides))
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


def test_several_problems_are_listed_one_a_line(run_config):
    with pytest.raises(UserError) as caught:
        check(run_config("rollout.chunk=5", "rewards.judge.role=monitor"))
    assert len(str(caught.value).splitlines()) == 2


def test_a_sound_run_has_no_notes(run_config):
    assert check(run_config()) == []
    assert check(run_config("algorithm.kind=grpo")) == []
    assert check(run_config(*GENEVAL)) == []


def test_txt_prompts_have_nothing_for_a_geneval_reward(run_config, tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("\n".join(f"prompt {i}" for i in range(20)))
    with pytest.raises(UserError, match="rewards.judge judges none of the training prompts: it needs metadata"):
        check(run_config("prompts.kind=txt", f"prompts.path={file}"))
    assert len(check(run_config("prompts.kind=txt", f"prompts.path={file}", "rewards.judge.kind=clip_score"))) == 0


def test_a_broken_prompt_file_is_named(run_config, tmp_path):
    with pytest.raises(UserError, match="prompt file .*no.txt does not exist"):
        check(run_config("prompts.kind=txt", f"prompts.path={tmp_path}/no.txt"))


def test_training_on_an_evaluation_file_is_refused_until_it_is_excluded(run_config, tmp_path):
    config = run_config(*GENEVAL, "evaluate.prompts.split=all", "prompts.split=all", "prompts.seed=1")
    file = tmp_path / "test.jsonl"
    from align_cluster.prompts.geneval import GenevalPrompts

    records = [prompt.metadata for prompt in GenevalPrompts(config.evaluate.prompts).load()]
    file.write_text("\n".join(map(json.dumps, records)))
    on_file = ["prompts.split=all", "evaluate.prompts.kind=jsonl", f"evaluate.prompts.path={file}"]
    base = [o for o in GENEVAL if not o.startswith("evaluate.prompts")]
    with pytest.raises(UserError, match="trained on as well.*prompts.exclude"):
        check(run_config(*base, *on_file))
    assert check(run_config(*base, *on_file, f"prompts.exclude={file}")) == []


def test_noise_that_the_algorithm_does_not_use_is_noted(run_config):
    (note,) = check(run_config("rollout.step.kind=flow_sde"))
    assert "rollout.step.kind is flow_sde" in note and "dpm2" in note


def test_prompts_that_no_reward_judges_are_noted(run_config):
    (note,) = check(run_config("prompts.tasks=[colors, ocr]", "prompts.even=false"))
    assert "training prompts have no reward" in note and "a sign that says" in note


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_every_shipped_run_file_is_valid(file):
    assert check(load(ROOT / "configs" / file)) == []


def test_the_quickstart_runs_with_the_other_algorithm():
    config = load(ROOT / "configs/quickstart.yaml", ["algorithm.kind=grpo"])
    assert check(config) == [] and config.algorithm.kind == "grpo"
