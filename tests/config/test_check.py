import json
from pathlib import Path
from typing import Literal

import pytest
from PIL import Image

from align_cluster.backbones import BACKBONES
from align_cluster.backbones.sd3 import SD3
from align_cluster.cli import main
from align_cluster.config.check import check
from align_cluster.config.load import dump, load, loads
from align_cluster.embedded import pipeline_path
from align_cluster.errors import UserError

ROOT = Path(__file__).parents[2]

GENEVAL = ["backbone.path=a/b", "prompts.kind=geneval", "prompts.count=500", "rewards.judge.kind=clip_score"]
GENEVAL += ["evaluate.prompts.kind=geneval", "evaluate.prompts.split=held_out", "evaluate.prompts.count=300"]
UNET = ["backbone.kind=sd1", "backbone.path=a/b", "algorithm.kind=grpo"]

PROBLEMS = [
    (["rollout.chunk=2", "learner.micro_batch=3"], ["learner.micro_batch is 3", "chunks of 2", "at most 2"]),
    (["learner.updates_per_step=25"], ["learner.updates_per_step is 25", "24 images", "at most 24"]),
    (
        ["algorithm.kind=grpo", "learner.fold=2"],
        ["learner.fold is 2", "algorithm.kind grpo", "log-probs", "leave it out"],
    ),
    (
        ["algorithm.kind=grpo", "backbone.compile=true"],
        ["backbone.compile is true", "compares log-probs", "ratio_tolerance is 1e-05", "false, or the tolerance"],
    ),
    (["rollout.group_size=1"], ["rollout.group_size is 1", "2 or more"]),
    (["algorithm.kind=grpo", "rollout.step.kind=euler"], ["rollout.step.kind is euler", "grpo", "flow_sde"]),
    (["algorithm.kind=grpo", "rollout.steps=1"], ["rollout.steps is 1", "2 or more"]),
    (["algorithm.timesteps=9"], ["algorithm.timesteps is 9", "4 noise levels", "at most 4"]),
    (["rewards.judge.role=monitor"], ["nothing to train on", "rewards.judge.role to train"]),
    (["rewards.judge.weight=0"], ["weight 0", "rewards.judge.weight"]),
    (["backbone.path=./missing"], ["backbone.path is ./missing", "hub id"]),
    (["backbone.path=embeded"], ["backbone.path is embeded", "embedded"]),
    (
        ["backbone.lora.targets=[attn.to_q, attn.to_w]"],
        ["targets has 'attn.to_w', which no layer", "did you mean attn.to_"],
    ),
    (["backbone.lora.targets=[attn]"], ["targets has 'attn', which is no linear layer or convolution"]),
    (["backbone.lora.targets=['']"], ["targets has '', which is no linear layer", "there are layers such as"]),
    (["checkpoint.path=memory://runs"], ["checkpoint.path is memory://runs, which ends with the process"]),
    (
        ["checkpoint.path=nosuchfs://x"],
        ["checkpoint.path is nosuchfs://x, which is of no file system", "give a folder"],
    ),
    (["backbone.path=tests"], ["backbone.path is tests", "model_index.json"]),
    (
        ["backbone.kind=flux", "backbone.path=embedded"],
        ["backbone.path is embedded, a StableDiffusion3Pipeline", "takes a FluxPipeline", "set backbone.kind to sd3"],
    ),
    (
        [*UNET, "rollout.step.kind=flow_sde"],
        ["rollout.step.kind is flow_sde", "sd1 predicts epsilon or v", "one of ddim"],
    ),
    ([*UNET, "rollout.schedule.kind=linear"], ["rollout.schedule.kind is linear", "leave rollout.schedule out"]),
    ([*UNET, "algorithm.kind=nft"], ["algorithm.kind is nft", "sd1 predicts epsilon or v", "backbone.kind to sd3"]),
    (["prompts.kind=geneval"], ["prompts.kind is geneval", "embedded model never saw", "set it to embedded"]),
    (["evaluate.count=1000"], ["evaluate.count is 1000", "evaluate.prompts has", "at most"]),
    (
        ["prompts_per_step=5000", "rollout.group_size=2"],
        ["prompts_per_step is 5000", "prompts has 1167", "at most 1167"],
    ),
    (["evaluate.prompts.split=train"], ["evaluate.prompts: 1167 prompts are trained on", "split to held_out"]),
    ([*GENEVAL, "prompts.split=all"], ["prompts are trained on as well", "split to held_out"]),
    (["prompts.tasks=[ocr]"], ["rewards.judge judges none of the training prompts", "include"]),
    (["rewards.judge.kind=ocr"], ["rewards.judge judges none of the training prompts", "quote text"]),
    ([*GENEVAL, "rewards.judge.kind=geneval"], ["embedded detector knows circle", "mask2former", "clip_score"]),
    (["rewards.judge.detector=detr"], ["detr detector knows 80 classes", "ask for 'circle'", "clip_score"]),
]


@pytest.mark.parametrize(("overrides", "parts"), PROBLEMS, ids=[p[1][0] for p in PROBLEMS])
def test_a_combination_that_cannot_work_gives_one_sentence_with_the_remedy(run_config, overrides, parts, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as caught:
        check(run_config(*overrides))
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


@pytest.mark.parametrize("text", ["{", "[]", '"StableDiffusionPipeline"', "{}"])
def test_a_folder_whose_index_names_no_pipeline_is_refused(run_config, tmp_path, text):
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(UserError, match=f"^backbone.path is {tmp_path}, whose model_index.json names no pipeline; "):
        check(run_config(f"backbone.path={tmp_path}"))


def test_validate_refuses_the_size_and_notes_the_prompts(tmp_path, run_config):
    with pytest.raises(UserError, match="^backbone.width is 64, and the model of 'embedded' has positions for 48 pix"):
        check(run_config("backbone.width=64"))
    words = "a photo of a red circle and a blue square and a green triangle and"
    (tmp_path / "long.txt").write_text(f"{words} a star\n{words} a circle\na photo of a star\n")
    limit = json.loads((pipeline_path() / "text_encoder" / "config.json").read_text())["max_position_embeddings"]
    notes = check(
        run_config(
            *("prompts.kind=txt", f"prompts.path={tmp_path / 'long.txt'}"),
            *("rewards.judge.kind=clip_score", "prompts_per_step=2"),
        )
    )
    assert any(f"have more than the {limit} tokens" in note and "2 of them draw the same" in note for note in notes)


def test_several_problems_are_listed_one_a_line(run_config):
    with pytest.raises(UserError) as caught:
        check(run_config("learner.updates_per_step=25", "rewards.judge.role=monitor"))
    assert len(str(caught.value).splitlines()) == 2


def test_a_sound_run_has_no_notes(run_config):
    assert check(run_config()) == []
    assert check(run_config("algorithm.kind=grpo")) == []
    assert check(run_config(*GENEVAL)) == []
    for detector in ("mask2former", "detr"):
        assert check(run_config(*GENEVAL, "rewards.judge.kind=geneval", f"rewards.judge.detector={detector}")) == []


def test_an_object_by_cocos_name_gets_genevals_name(run_config, tmp_path):
    files = {}
    for name, objects in (("train", "mouse cup"), ("test", "fork knife")):
        files[name] = tmp_path / f"{name}.jsonl"
        lines = [
            {"prompt": f"{count} {noun}", "include": [{"class": noun, "count": count}]}
            for noun in objects.split()
            for count in range(1, 9)
        ]
        files[name].write_text("\n".join(map(json.dumps, lines)))
    overrides = ["backbone.path=a/b", "rewards.judge.detector=mask2former"]
    overrides += ["prompts.kind=jsonl", f"prompts.path={files['train']}"]
    overrides += ["evaluate.prompts.kind=jsonl", f"evaluate.prompts.path={files['test']}"]
    with pytest.raises(UserError, match="ask for 'mouse'; write 'computer mouse'"):
        check(run_config(*overrides))


def test_txt_prompts_have_nothing_for_a_geneval_reward(run_config, tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("\n".join(f"prompt {i}" for i in range(20)))
    with pytest.raises(UserError, match="rewards.judge judges none of the training prompts: it needs metadata"):
        check(run_config("prompts.kind=txt", f"prompts.path={file}"))
    (note,) = check(run_config("prompts.kind=txt", f"prompts.path={file}", "rewards.judge.kind=clip_score"))
    assert note.startswith("20 of 149 prompts have words that the text encoder does not know")


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


RUN_FILES = sorted(path.name for path in (ROOT / "configs").glob("*.yaml") if not path.stem.endswith("_service"))


@pytest.mark.parametrize("file", RUN_FILES)
def test_every_shipped_run_file_is_valid_and_so_is_what_its_run_keeps_of_it(file, tmp_path, monkeypatch):
    config = load(ROOT / "configs" / file)
    monkeypatch.chdir(tmp_path)
    for source in (config.prompts, config.evaluate.prompts):
        if source.kind == "txt":  # published prompts, which users bring
            Path(source.path).write_text("".join(f"{source.path} {number}\n" for number in range(200)))
    if config.rollout.offline:  # a folder of the user's own
        for number in range(config.prompts_per_step):
            Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
            (tmp_path / f"{number}.txt").write_text(f"a view of mountain {number}")
        config = load(ROOT / "configs" / file, [f"prompts.folder={tmp_path}"])
    assert check(config) == [] and loads(dump(config)) == config


def test_the_quickstart_runs_with_the_other_algorithm():
    config = load(ROOT / "configs/quickstart.yaml", ["algorithm.kind=grpo"])
    assert check(config) == [] and config.algorithm.kind == "grpo"


# -------------------------------------------------------------------------------- exploration, windows, shaping, credit

E2PO, GRPO = ["exploration.kind=e2po", "exploration.conditions=4"], ["algorithm.kind=grpo"]
SLAS = ["advantage.shaping.kind=slas", "advantage.std=batch"]
ADAPTIVE = [*SLAS, "advantage.shaping.gamma=adaptive"]
WORST = [*ADAPTIVE, "advantage.shaping.bound=worst_case"]
TWO_UPDATES = ["advantage.std=update", "learner.updates_per_step=2"]
AS_GIVEN = ["advantage.rescale_weights=false"]

GDPO = [*E2PO, "advantage.mix=gdpo", "learner.updates_per_step=2"]

REFUSED = [
    (GDPO, ["advantage.mix is gdpo", "an update 2 of the 4 groups", "at most 1", "mix to normalise_then_sum"]),
    ([*SLAS, "prompts_per_step=3"], ["std is batch", "a step has 3 groups", "prompts_per_step to at least 4"]),
    ([SLAS[0], "advantage.std=global", "prompts_per_step=3"], ["advantage.std is global", "a step has 3 groups"]),
    (
        ["advantage.std=update", "prompts_per_step=3"],
        ["advantage.std is update", "3 of the 3 groups", "per_step to 1", "std to group"],
    ),
    (AS_GIVEN, ["rescale_weights is false", "never scales weights", "mix to normalise_then_sum"]),
    (
        [*GRPO, *SLAS, "advantage.shaping.gamma=200"],
        ["advantage.shaping.gamma is 200", "beats all 24", "would overflow", "at most 17"],
    ),
    (
        [*GRPO, *ADAPTIVE, "advantage.shaping.gamma_max=300", "advantage.clip=5"],
        ["advantage.shaping.gamma_max is 300", "would overflow", "at most 150"],
    ),
    ([*E2PO, "rollout.chunk=6", "learner.micro_batch=7"], ["learner.micro_batch is 7", "chunks of 6", "at most 6"]),
    ([*E2PO, "learner.updates_per_step=97"], ["learner.updates_per_step is 97", "96 images", "at most 96"]),
    (
        ["algorithm.kind=ppo", "learner.fold=3"],
        ["learner.fold is 3", "algorithm.kind ppo", "log-probs", "leave it out"],
    ),
    (["learner.fold=0"], ["learner.fold is 0", "above 0"]),
    (["exploration.conditions=1", "rollout.group_size=1"], ["rollout.group_size is 1", "2 or more"]),
    (["exploration.conditions=0"], ["exploration.conditions is 0", "above 0"]),
    (["exploration.conditions=-3"], ["exploration.conditions is -3", "above 0"]),
    (["exploration.rho=0"], ["exploration.rho is 0", "above 0"]),
    (["exploration.rho=1.2"], ["exploration.rho is 1.2", "at most 1"]),
    (
        ["exploration.anchor=false", "exploration.conditions=1"],
        ["exploration.anchor is false", "conditions to 2 or more", "anchor to true"],
    ),
    (
        ["exploration.schedule=static", "exploration.clock=time"],
        ["exploration.clock is time", "static reads no clock", "schedule to fading"],
    ),
    (
        [*GRPO, *E2PO, "exploration.update=perturbed"],
        ["exploration.update is perturbed", "algorithm.kind grpo", "set it to original, or algorithm.kind to nft"],
    ),
    (
        [*UNET, *E2PO, "exploration.encoders=both"],
        ["exploration.encoders is both", "sd1 has no second CLIP text encoder", "set it to first"],
    ),
    (["exploration.mu=-2"], ["exploration.mu is -2", "at least -1"]),
    ([*SLAS, "advantage.shaping.gamma=-1"], ["advantage.shaping.gamma is -1", "at least 0, or 'adaptive'"]),
    (
        [*SLAS, "advantage.shaping.gamma=adaptiv"],
        ["advantage.shaping.gamma is 'adaptiv'", "a number, or 'adaptive'", "did you mean adaptive?"],
    ),
    ([SLAS[0]], ["advantage.shaping is slas", "advantage.std is group", "set it to batch (or global)"]),
    ([SLAS[0], "advantage.std=none"], ["advantage.shaping is slas", "advantage.std is none", "batch (or global)"]),
    (WORST, ["advantage.shaping.bound is worst_case", "needs log-probs", "nft has none", "set it to tail"]),
    (
        [*GRPO, *WORST, "advantage.shaping.order=shape_then_norm"],
        ["advantage.shaping.bound is worst_case", "updates of one size", "order to norm_then_shape"],
    ),
    ([*GRPO, *WORST, "learner.zero_stage=3"], ["bound is worst_case", "learner.zero_stage is 3", "set it to 2"]),
    (TWO_UPDATES, ["advantage.std is update", "2 of the 4 groups", "at most 1, or advantage.std to batch"]),
    ([*GRPO, "rollout.window.kind=sliding"], ["rollout.window.size is 4", "rollout of 4 steps", "at most 3"]),
    (
        [*GRPO, "rollout.window.kind=fast", "rollout.window.size=3"],
        ["rollout.window.size is 3", "first half of a rollout of 4 steps has 2", "at most 2"],
    ),
    (
        [*GRPO, "rollout.window.kind=fast", "rollout.window.range=[0, 4]"],
        ["rollout.window.range ends at 4", "3 that can be trained", "end at 3 or before"],
    ),
    (
        [*GRPO, "rollout.window.kind=fast", "rollout.window.range=[0, 1]"],
        ["rollout.window.size is 2", "rollout.window.range has 1", "at most 1"],
    ),
    (
        [*GRPO, "rollout.window.kind=fast", "rollout.window.range=[2, 2]"],
        ["rollout.window.range is [2, 2]", "holds no step"],
    ),
    ([*GRPO, "rollout.window.kind=fraction", "rollout.window.fraction=0"], ["rollout.window.fraction is 0", "above 0"]),
    ([*GRPO, "rollout.window.kind=slide"], ["rollout.window.kind is 'slide'", "did you mean sliding?"]),
    (
        ["rollout.window.kind=sliding", "rollout.window.size=2"],
        ["rollout.window", "algorithm.kind nft trains none", "leave rollout.window out"],
    ),
    (
        [*GRPO, "rollout.window.kind=fast", "rollout.step.kind=dpm2"],
        ["rollout.step.kind is dpm2", "no density", "flow_sde", "or leave rollout.step out"],
    ),
    (
        ["rollout.step.kind=ddim"],
        ["rollout.step.kind is ddim", "sd3 predicts a velocity", "euler, dpm2, flow_sde, dance_sde, cps, flow_ddim"],
    ),
    (
        [*GRPO, "rollout.step.kind=ddim"],
        ["rollout.step.kind is ddim", "predicts a velocity", "one of flow_sde, dance_sde, cps, flow_ddim"],
    ),
    (
        [*GRPO, "algorithm.ratio=guard", "rollout.step.kind=cps"],
        ["algorithm.ratio is guard", "Gaussian density", "flow_sde or dance_sde", "algorithm.ratio to plain"],
    ),
    (["rollout.same_noise=true"], ["rollout.same_noise", "dpm2 adds none", "same_noise to false"]),
    ([*E2PO, "rollout.same_noise=true", "rollout.step.kind=euler"], ["rollout.same_noise", "euler adds none"]),
    (
        [*GRPO, "rollout.same_noise=true", "rollout.step.kind=euler"],
        ["rollout.step.kind is euler", "no density", "flow_sde"],
    ),
]


@pytest.mark.parametrize(("overrides", "parts"), REFUSED, ids=[" ".join(refused[0]) for refused in REFUSED])
def test_what_the_new_settings_cannot_do_is_one_sentence_and_exit_code_2(text, tmp_path, capsys, overrides, parts):
    (tmp_path / "run.yaml").write_text(text)
    assert main(["validate", str(tmp_path / "run.yaml"), "--set", *overrides]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    assert all(part in err for part in parts), err


REMEDIES = [
    [*E2PO, "rollout.chunk=7"],  # a chunk takes rows of any groups
    [*E2PO, "rollout.chunk=48"],
    ["learner.updates_per_step=24"],
    [*GRPO, "learner.fold=1"],
    ["learner.fold=3", "learner.micro_batch=12"],
    [*E2PO, "rollout.group_size=1"],  # conditions alone are compared, too
    [*E2PO, "exploration.rho=1"],
    [*E2PO, "exploration.anchor=false", "exploration.encoders=both", "exploration.update=perturbed"],
    [*E2PO, "exploration.clock=time", "exploration.learned=each_time"],
    [*E2PO, "exploration.schedule=static"],
    [*SLAS, "advantage.shaping.gamma=0"],
    [*SLAS, "advantage.std=global"],
    [*GRPO, *ADAPTIVE],
    ADAPTIVE,  # the tail of advantages needs no log-probs
    [*GRPO, *ADAPTIVE, "learner.zero_stage=3", "advantage.shaping.order=shape_then_norm"],
    [*GRPO, *WORST],
    [*GRPO, *SLAS, "advantage.shaping.gamma=17"],
    [*AS_GIVEN, "advantage.mix=normalise_then_sum"],
    [*TWO_UPDATES, "prompts_per_step=8", "rollout.chunk=5"],  # updates take whole groups all the same
    [*TWO_UPDATES, *E2PO, "learner.updates_per_step=1"],
    [*TWO_UPDATES, "advantage.std=batch"],
    ["advantage.std=batch", *E2PO],  # one update holds all groups
    [*GRPO, "rollout.window.kind=sliding", "rollout.window.size=3"],
    [*GRPO, "rollout.window.kind=fast", "rollout.window.range=[1, 3]"],
    [*GRPO, "rollout.window.kind=fraction", "rollout.window.choice=per_sample"],
    [*GRPO, "algorithm.ratio=guard", "rollout.step.kind=dance_sde"],
    [*GRPO, "rollout.same_noise=true"],
    [*GDPO, "learner.updates_per_step=1"],
    [*GDPO, "advantage.mix=normalise_then_sum"],
    [*GRPO, "rollout.step.kind=flow_ddim", "rollout.schedule.kind=linear"],
    [*GRPO, "rollout.step.kind=flow_ddim", "algorithm.ratio=guard"],
    [*GRPO, *E2PO, "rollout.schedule.kind=flux"],
]


@pytest.mark.parametrize("overrides", REMEDIES, ids=[" ".join(remedy) for remedy in REMEDIES])
def test_the_nearest_valid_choices_are_valid_and_bring_no_notes(run_config, overrides):
    assert check(run_config(*overrides)) == []


def test_exploring_a_backbone_without_a_clip_encoder_is_refused_with_one_that_has_it(run_config, monkeypatch):
    class Plain(SD3):
        class Config(SD3.Config):
            kind: Literal["plain"] = "plain"

        explorable = False

    monkeypatch.setitem(BACKBONES, "plain", Plain)
    config = run_config(*E2PO).model_copy(update={"backbone": Plain.Config()})
    with pytest.raises(UserError) as caught:
        check(config)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("exploration.kind is e2po")
    for part in ("CLIP text encoder", "backbone.kind plain has none", "set backbone.kind to sd3"):
        assert part in message
    assert check(config.model_copy(update={"exploration": None})) == []


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["exploration.kind=e2po", "exploration.conditions=1"], ["exploration.conditions is 1", "nothing is explored"]),
        (
            ["learner.guidance_gradient=both"],
            ["learner.guidance_gradient is both", "rollout.guidance 1 has no second branch"],
        ),
        (["algorithm.old=on_policy", "loop.ahead=1"], ["algorithm.old is on_policy", "set loop.ahead to 0"]),
        (["rollout.step.kind=cps"], ["rollout.step.kind is cps", "nft has no use for", "dpm2"]),
        (
            [*GRPO, "rollout.step.kind=flow_ddim"],
            ["rollout.step.kind is flow_ddim", "noise vanishes", "schedule.kind linear or algorithm.ratio guard"],
        ),
    ],
)
def test_a_setting_without_effect_is_noted_and_allowed(text, run_config, tmp_path, capsys, overrides, parts):
    (note,) = check(run_config(*overrides))
    assert all(part in note for part in parts), note
    (tmp_path / "run.yaml").write_text(text)
    assert main(["validate", str(tmp_path / "run.yaml"), "--set", *overrides]) == 0
    assert capsys.readouterr().err == f"note: {note}\n"
