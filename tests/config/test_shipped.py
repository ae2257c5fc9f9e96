"""Run files that ship with the package."""

import json
from pathlib import Path

import pytest

from align_cluster.cli import main
from align_cluster.config.load import load
from align_cluster.config.shipped import FOLDER, find, shipped
from align_cluster.errors import UserError
from align_cluster.serving.config import ServiceConfig

CONFIGS = Path(__file__).parents[2] / "configs"


def test_the_package_has_every_file_of_the_repositorys_folder():
    assert {file.name for file in FOLDER.iterdir()} == {file.name for file in CONFIGS.iterdir()}


def test_a_shipped_file_is_found_by_name_where_there_is_no_such_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "quickstart.yaml", "configs/quickstart.yaml"):
        assert load(name) == load(CONFIGS / "quickstart.yaml")
    assert load("rewards_service", model=ServiceConfig).port == 8000
    assert main(["validate", "quickstart"]) == 0 and "quickstart is valid" in capsys.readouterr().out
    assert main(["sample", "embedded_grpo", "--prompt", "x", "--lora", "nowhere"]) == 2  # the file is found, no LoRA is
    assert "nowhere holds no LoRA" in capsys.readouterr().err
    for other in ("quickstart.yml", "runs/quickstart", "/quickstart", "../quickstart.yaml"):
        assert find(other) == Path(other)


def test_the_run_files_of_srpo_and_refl_have_the_numbers_of_the_official_scripts():
    """SRPO: SRPO_training_hpsv2.sh and _ps.sh. ReFL: ReFL.py and train_refl.sh, 8 processes x 2 images x 4 batches."""
    for name, guidance in (("flux_dev_srpo_hps", 1), ("flux_dev_srpo_pickscore", 2)):
        run = load(name)
        assert run.steps * run.learner.updates_per_step == 19, "the checkpoint is saved before the update of step 20"
        assert run.rollout.step.truncate_timesteps and run.algorithm.truncate_timesteps
        assert (run.algorithm.positive[0], run.algorithm.negative[0]) == ("Detail", "Painting"), "counted from step 1"
        assert run.rollout.distilled_guidance == guidance
    for name in ("sd14_refl", "sd15_refl"):
        run = load(name)
        assert (run.prompts_per_step, run.images_per_step, run.steps) == (8 * 2 * 4, 64, 100)
        assert (run.step_kind.kind, run.step_kind.eta, run.rollout.steps) == ("ddim", 1.0, 40)
        assert (run.algorithm.steps, run.algorithm.margin, run.algorithm.grad_scale) == ((30, 39), 2.0, 1e-3)


def test_a_file_of_the_users_own_comes_first_and_a_folder_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()  # as `train --out .` leaves it
    assert find("quickstart") == shipped()["quickstart"]
    (tmp_path / "quickstart.yaml").write_text("mine")
    assert find("quickstart.yaml") == Path("quickstart.yaml")


def test_a_misspelt_name_is_told_with_the_one_that_was_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"quikstart does not exist; did you mean quickstart\?"):
        load("quikstart")
    (tmp_path / "my_run.yaml").write_text("")
    with pytest.raises(UserError, match=r"did you mean my_run.yaml\?"):
        load("my_ran.yaml")


def test_init_copies_a_file_that_works_with_a_schema_that_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in shipped():
        assert main(["init", name]) == 0
        service = name == "rewards_service"
        text = Path(f"{name}.yaml").read_text()
        schema = "service.schema.json" if service else "run.schema.json"
        assert text.startswith(f"# yaml-language-server: $schema={schema}\n") and json.loads(Path(schema).read_text())
        told = f"align-cluster {'serve-rewards' if service else 'train'} {name}.yaml"
        assert told in capsys.readouterr().out
        assert not service or load(f"{name}.yaml", model=ServiceConfig)
    assert main(["init", "--out", "my runs.yaml"]) == 0
    for told in (Path("my runs.yaml").read_text(), capsys.readouterr().out):
        assert "align-cluster train 'my runs.yaml'" in told
    assert load("my runs.yaml") == load(CONFIGS / "quickstart.yaml")


def test_init_writes_over_nothing_unless_it_is_told_to(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = [Path("quickstart.yaml"), Path("run.schema.json")]
    for file in files:
        file.write_text("mine")
    assert main(["init"]) == 2
    assert capsys.readouterr().err == (
        "error: quickstart.yaml exists already; give --out another file, or --force to write over it\n"
    )
    assert main(["init", "--out", "other.yaml"]) == 0
    assert [file.read_text() for file in files] == ["mine"] * 2
    assert main(["init", "--force"]) == 0
    assert not {"mine"} & {file.read_text() for file in files}


def test_init_says_what_it_cannot_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused = {
        "init: no run file 'quikstart' ships with align-cluster; did you mean quickstart?": ["quikstart"],
        "no run file 'x' ships with align-cluster; `align-cluster list configs` names them": ["x"],
        "nowhere/a.yaml cannot be written (No such file": ["--out", "nowhere/a.yaml"],
        f"{tmp_path} exists already": ["--out", str(tmp_path)],
    }
    for words, arguments in refused.items():
        assert main(["init", *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_list_of_shipped_files_says_a_line_about_each(capsys):
    assert main(["list", "configs"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines.keys() == shipped().keys()
    assert lines["quickstart"] == "Aligns the embedded model with DiffusionNFT"
