"""What algorithms that follow rewards' gradients cannot do, and what they can and one probably does not mean."""

import json

import pytest
from PIL import Image

from align_cluster.config.check import check
from align_cluster.errors import UserError
from align_cluster.prompts.images import survey

CLIP = ["advantage={}", "rewards.judge.kind=clip_score"]
WORDS = ["algorithm.positive=[large]", "algorithm.negative=[small]"]
SRPO = ["algorithm.kind=srpo", *CLIP, *WORDS]
REFL = ["algorithm.kind=refl", *CLIP, "algorithm.steps=[2, 3]"]
DRAFT = ["algorithm.kind=draft", *CLIP, "algorithm.last=2"]

PROBLEMS = [
    ([*SRPO, "rewards.judge.kind=geneval"], ["rewards.judge is of kind geneval", "no gradient", "clip_score", "hps"]),
    ([*REFL, "rewards.judge.kind=jpeg"], ["rewards.judge is of kind jpeg", "algorithm.kind refl"]),
    (
        [*SRPO, "rewards.judge.kind=aesthetic"],
        ["rewards.judge is of kind aesthetic", "reads no text", "relative to noise or none"],
    ),
    ([*SRPO, "algorithm.relative=none"], ["algorithm.branches is both", "set it to denoise"]),
    (["algorithm.kind=refl", *CLIP], ["algorithm.steps is [30, 39]", "ends with step 3", "[3, 3]"]),
    ([*DRAFT, "algorithm.last=9"], ["algorithm.last is 9", "at most 4"]),
    ([*DRAFT, "algorithm.renoised=2"], ["algorithm.renoised is 2", "algorithm.last is 2", "last to 1"]),
    ([*DRAFT, "rollout.step.kind=dpm2"], ["rollout.step.kind is dpm2", "algorithm.kind draft leave rollout.step out"]),
    ([*DRAFT, "rollout.step.kind=flow_sde"], ["cannot be repeated", "algorithm.kind draft leave rollout.step out"]),
    (
        [*DRAFT, "backbone={kind: sd1, path: nobody/nothing}", "rollout.step={kind: euler, truncate_timesteps: true}"],
        ["rollout.step.truncate_timesteps cuts", "backbone.kind sd1 takes whole timesteps", "leave it out"],
    ),
    ([*REFL, "rollout.offline=true", "prompts.kind=embedded"], ["rollout.offline", "algorithm.kind to srpo"]),
    ([*SRPO, "rollout.offline=true"], ["prompts.kind embedded has none", "set it to images"]),
    ([*SRPO, "rollout.distilled_guidance=1"], ["guidance-distilled", "backbone.kind sd3", "leave it out"]),
    (
        [*REFL, "rewards.judge.kind=pickscore", "algorithm.margin=2.0"],
        ["algorithm.margin is 2", "usually about 20", "set it to null"],
    ),
]


@pytest.mark.parametrize(("overrides", "parts"), PROBLEMS, ids=[p[1][0] for p in PROBLEMS])
def test_what_cannot_work_gives_one_sentence_with_the_remedy(run_config, overrides, parts):
    with pytest.raises(UserError) as caught:
        check(run_config(*overrides))
    sentences = str(caught.value).splitlines()
    assert any(all(part in sentence for part in parts) for sentence in sentences), sentences


@pytest.mark.parametrize("settings", [SRPO, REFL, DRAFT, [*SRPO, "rollout.group_size=1"]])
def test_a_sound_run_has_no_notes_and_needs_no_groups(run_config, settings):
    assert check(run_config(*settings)) == []


def test_one_noise_for_a_whole_step_is_fine_where_a_prompt_has_one_image(run_config):
    assert check(run_config(*SRPO, "rollout.group_size=1", "rollout.same_noise=step")) == []
    with pytest.raises(UserError, match="rollout.same_noise starts a whole group from one noise"):
        check(run_config(*SRPO, "rollout.same_noise=step"))


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("lihgt background", "knows 1 of 2 words, and not 'lihgt'; the nearest that it knows is 'light'"),
        ("Photorealism", "knows 0 of 1 words, and not 'Photorealism'; the nearest that it knows is 'photo'"),
    ],
)
def test_a_control_word_that_the_tokenizer_does_not_know_is_noted_with_the_nearest(run_config, word, said):
    (note,) = check(run_config(*SRPO, f"algorithm.positive=[large, {word}]"))
    assert note == f"algorithm.positive: {word!r}: the tokenizer of rewards.judge {said}"


def test_without_the_tokenizer_published_words_pass_and_others_are_noted(run_config):
    run = [*SRPO, "rewards.judge.path=nobody/nothing", "algorithm.positive=[Detail, Natural-lihgting]"]
    notes = check(run_config(*run, "algorithm.negative=[Oil]"))
    assert notes == [
        "algorithm.positive: 'Natural-lihgting': the tokenizer of rewards.judge is not on this machine, so whether it "
        "knows 'lihgting' is not known; the nearest that is published is 'lighting'"
    ]


def test_settings_without_effect_and_levels_that_distort_are_noted(run_config):
    (note,) = check(run_config(*SRPO, "advantage.std=global"))
    assert note.startswith("advantage: algorithm.kind srpo follows")
    (note,) = check(run_config(*SRPO, "algorithm.levels=[0.995, 0.7]"))
    assert "above .99" in note
    (note,) = check(run_config(*DRAFT, "algorithm.last=1"))
    assert "begins at noise .009" in note


def test_images_that_are_left_out_are_noted_with_their_number(run_config, tmp_path):
    survey.cache_clear()
    rows = []
    for index in range(7):
        Image.new("RGB", (48, 48), (30 * index, 0, 0)).save(tmp_path / f"{index}.png")
        rows.append({"file_name": f"{index}.png", "text": f"a photo of {index} stars"})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows[:5])))
    offline = ["rollout.offline=true", "prompts.kind=images", f"prompts.folder={tmp_path}"]
    (note,) = check(run_config(*SRPO, *offline))
    assert note == f"{tmp_path}: of 7 images are left out 2 without a caption, such as 5.png"


def test_a_job_takes_no_folder_of_images_along(run_config, tmp_path):
    from align_cluster.cluster.submit import fill

    offline = ["rollout.offline=true", "prompts.kind=images"]
    with pytest.raises(UserError, match="give the absolute path of a folder that all nodes see"):
        fill(tmp_path, run_config(*SRPO, *offline, "prompts.folder=pictures"), [])
    fill(tmp_path, run_config(*SRPO, *offline, "prompts.folder=/shared/pictures"), [])
    assert "/shared/pictures" in (tmp_path / "config.yaml").read_text()
