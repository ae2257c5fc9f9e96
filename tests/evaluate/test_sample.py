"""What `sample` leaves in its folder, on the embedded pipeline without Ray."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from align_cluster.backbones.lora_file import read_lora
from align_cluster.cli import main
from align_cluster.config.load import dump, load
from align_cluster.embedded import pipeline_path
from align_cluster.errors import UserError
from align_cluster.evaluate.sample import SampleRequest, read_prompts, sample
from align_cluster.observe.grids import GAP, LINE, MARGIN
from align_cluster.types import Prompt

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
METADATA = {"tag": "single_object", "include": [{"class": "circle", "count": 1, "color": "red"}], "exclude": []}
PROMPTS = [Prompt(0, "a photo of a red circle", METADATA), Prompt(1, "a photo of two stars")]


def draw(out, lora=None, **settings):
    settings = {"count": 2, "steps": 2, "guidance": 1.0, "score": False} | settings
    facts = sample(load(QUICKSTART), lora and read_lora(lora), SampleRequest(prompts=PROMPTS, **settings), out)
    assert json.loads((out / "samples.json").read_text()) == facts
    return facts, np.stack([np.asarray(Image.open(out / image["file"])) for image in facts["images"]])


def test_images_an_overview_and_how_they_were_made(tmp_path, lora):
    facts, images = draw(tmp_path / "out", lora=lora[0])
    assert images.shape == (4, 48, 48, 3) and facts["lora"] == str(lora[0]) and facts["steps"] == 2
    assert [image["file"] for image in facts["images"]] == ["000_00.png", "000_01.png", "001_00.png", "001_01.png"]
    assert len({image["seed"] for image in facts["images"]}) == 4 and "scores" not in facts["images"][0]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *(image["file"] for image in facts["images"]),
        *("grid.png", "samples.json"),
    }


def test_the_seed_fixes_the_images_and_the_lora_changes_them(tmp_path, lora):
    _, base = draw(tmp_path / "a")
    assert np.array_equal(base, draw(tmp_path / "b")[1])
    assert not np.array_equal(base, draw(tmp_path / "c", seed=1)[1])
    assert not np.array_equal(base, draw(tmp_path / "d", lora=lora[0])[1])
    assert not np.array_equal(base, draw(tmp_path / "e", guidance=3.0)[1])


def test_more_images_than_a_batch_are_the_same_ones_and_more(tmp_path):
    _, few = draw(tmp_path / "few", steps=1, count=8)
    _, many = draw(tmp_path / "many", steps=1, count=9)
    assert np.array_equal(many.reshape(2, 9, 48, 48, 3)[:, :8], few.reshape(2, 8, 48, 48, 3))


def test_base_and_aligned_stand_side_by_side_and_are_what_each_alone_draws(tmp_path, lora):
    facts, both = draw(tmp_path / "both", lora=lora[0], compare=True)
    assert [image["model"] for image in facts["images"]] == ["base"] * 4 + ["aligned"] * 4
    assert [image["seed"] for image in facts["images"][:4]] == [image["seed"] for image in facts["images"][4:]]
    assert np.array_equal(both[:4], draw(tmp_path / "base")[1])
    assert np.array_equal(both[4:], draw(tmp_path / "aligned", lora=lora[0])[1])
    grid = np.asarray(Image.open(tmp_path / "both" / "grid.png"))
    top, side = MARGIN + LINE + GAP + LINE + 2, 3 * 48
    for place, image in enumerate([both[0], both[1], both[4], both[5]]):
        left = MARGIN + place * (side + GAP)
        assert np.array_equal(grid[top : top + side : 3, left : left + side : 3], image)
    titles = grid[MARGIN : MARGIN + LINE, MARGIN : MARGIN + 4 * side].min((0, 2))
    starts = [
        titles[column : column + 40].min() < 128 for column in (0, side + GAP, 2 * (side + GAP), 3 * (side + GAP))
    ]
    assert starts == [True, False, True, False]


def test_every_image_has_the_scores_of_the_runs_rewards(tmp_path, lora):
    facts, _ = draw(tmp_path / "out", lora=lora[0], compare=True, score=True)
    scores = [image["scores"] for image in facts["images"]]
    assert all(-1 <= one["clip"] <= 1 for one in scores) and facts["failures"] == {}
    unjudged = [one["geneval"] is None for one in scores]
    assert unjudged == [False, False, True, True] * 2  # the second prompt has no metadata
    for model, part in (("base", scores[:4]), ("aligned", scores[4:])):
        np.testing.assert_allclose(facts["means"][model]["clip"], np.mean([one["clip"] for one in part]))
        np.testing.assert_allclose(facts["means"][model]["geneval"], np.mean([one["geneval"] for one in part[:2]]))


def test_a_lora_beside_its_runs_settings_needs_no_other_word(tmp_path, lora, capsys, monkeypatch):
    shutil.copytree(lora[0].parent, tmp_path / "run" / "lora")
    (tmp_path / "run" / "config.yaml").write_text(dump(load(QUICKSTART)))
    monkeypatch.chdir(tmp_path)
    drawing = ["--prompt", "a photo of a red circle", "--steps", "1", "--count", "1"]
    assert main(["sample", "--lora", "run/lora/pytorch_lora_weights.safetensors", *drawing]) == 0
    assert main(["sample", "--run", "run", *drawing, "--compare", "base", "--no-score"]) == 0
    printed = capsys.readouterr().out
    assert "aligned:  clip 0." in printed and "geneval" not in printed  # which scores no prompt without metadata
    assert "1 images in samples, overview in samples/grid.png" in printed and "2 images in samples-2" in printed
    drawn = [Image.open(f"{folder}/000_00.png").tobytes() for folder in ("samples", "samples-2")]
    assert drawn[0] == drawn[1] != Image.open("samples-2/000_00_base.png").tobytes()


def test_prompts_of_the_command_line_come_before_those_of_a_file(tmp_path):
    (tmp_path / "two.txt").write_text("one\ntwo\n")
    (tmp_path / "ocr.jsonl").write_text('{"prompt": "a sign", "text": "OPEN"}\n')
    assert [prompt.text for prompt in read_prompts(["zero"], str(tmp_path / "two.txt"))] == ["zero", "one", "two"]
    assert read_prompts([], str(tmp_path / "ocr.jsonl"))[0].metadata["text"] == "OPEN"


REFUSED = [
    (["--prompts", "empty-line.txt"], "prompt file empty-line.txt, line 2 is empty"),
    (["--prompts", "latin.txt"], "latin.txt cannot be read"),
    (["--prompt", " "], "--prompt ' ' is blank; write what to draw"),
    (["--prompt", "a\udcff"], "bytes that are no UTF-8"),
    (["--set", "backbone.path=/nowhere"], "'/nowhere' has no readable 'model_index.json' part"),
    (["--set", "backbone.height=40"], "backbone.height"),
    (
        ["--set", "backbone.path=coarse", "backbone.width=80"],
        "cannot divide into patches of 32 pixels; set it to 64",
    ),
    (["--compare", "base"], "--compare base needs a LoRA"),
    (["--steps", "0"], "--steps: '0' is no whole number of at least 1"),
    (["--run", "elsewhere"], "name one model"),
    (["--out", "taken"], "--out taken exists already"),
    (["--out", "taken.txt/out"], "--out taken.txt/out cannot be made"),
]


def test_what_cannot_be_drawn_is_one_sentence_and_no_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty-line.txt").write_text("one\n\nthree\n")
    (tmp_path / "latin.txt").write_bytes("ein Bär".encode("latin-1"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken.txt").touch()
    coarse = shutil.copytree(pipeline_path(), "coarse", ignore=shutil.ignore_patterns("*.safetensors"))
    vae = json.loads(Path(coarse, "vae", "config.json").read_text())
    Path(coarse, "vae", "config.json").write_text(json.dumps(vae | {"block_out_channels": [8] * 5}))
    before = {path.name for path in tmp_path.iterdir()}
    for arguments, words in REFUSED:
        prompt = [] if "--prompts" in arguments else ["--prompt", "a star"]
        assert main(["sample", str(QUICKSTART), *prompt, *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
        assert {path.name for path in tmp_path.iterdir()} == before


def test_what_breaks_half_way_leaves_no_folder(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr("align_cluster.evaluate.sample.save_grid", full)
    with pytest.raises(OSError, match="no space left"):
        draw(tmp_path / "out", steps=1, count=1)
    assert not list(tmp_path.iterdir())


def test_a_lora_alone_that_says_nothing_of_its_base_is_asked_for_it(tmp_path, lora, capsys):
    file = shutil.copy(lora[0], tmp_path / "x.safetensors")
    assert main(["sample", "--lora", str(file), "--prompt", "x"]) == 2
    assert "has no config.yaml beside it that names its base model; add --config" in capsys.readouterr().err


def test_a_prompt_is_needed():
    with pytest.raises(UserError, match="sample needs prompts"):
        read_prompts([], None)
