"""A model that is not there is found before a run or a service begins, whatever setting names it."""

from pathlib import Path

import pytest

from align_cluster.cli import main
from align_cluster.config.check import check_settings
from align_cluster.errors import UserError
from align_cluster.rewards import REWARDS
from align_cluster.rewards.detectors import DETECTORS
from align_cluster.rewards.hps import Hps
from align_cluster.rewards.sgp import JUDGES

ROOT = Path(__file__).parents[2]
PLACES = [  # what chooses a kind, the path of its block, and its class
    *(([f"rewards.judge.kind={kind}"], "rewards.judge", reward) for kind, reward in REWARDS.items()),
    *(([f"rewards.judge.detector.kind={kind}"], "rewards.judge.detector", one) for kind, one in DETECTORS.items()),
    *(
        (["rewards.judge.kind=sgp", f"rewards.judge.of.kind={kind}"], "rewards.judge.of", JUDGES[kind])
        for kind in JUDGES
    ),
]
NAMED = [(chosen, f"{where}.{name}") for chosen, where, kind in PLACES for name in kind.Config.reads]


@pytest.mark.parametrize(("chosen", "setting"), NAMED)
def test_every_setting_that_names_a_model_is_refused_where_nothing_is(run_config, chosen, setting):
    check_settings(run_config(*chosen))
    with pytest.raises(UserError) as caught:
        check_settings(run_config(*chosen, f"{setting}=/nowhere"))
    message = str(caught.value)
    assert message.startswith(f"{setting} is /nowhere, which is no ") and "; give " in message and "\n" not in message


FORMS = {  # of rewards.hps: a folder of this package, a file, names of the hub, of open_clip and of a json
    "path=align_cluster": "path is align_cluster, a folder without HPS_v2.1_compressed.pt; give a checkpoint",
    "path=README.md": None,
    "path=xswu/HPSv2": None,
    "path=README": "path is README, which is no file or folder here and no hub id; give a checkpoint",
    "model=ViT-L-14": None,
    "model=arch.json": "model is arch.json, which is no file here; give a name that open_clip knows, or a json",
    "path=https://host/file.pt": "path is https://host/file.pt, which is no file or folder here and no hub id",
}


@pytest.mark.parametrize(("given", "said"), FORMS.items())
def test_a_setting_takes_what_its_kind_can_load(given, said, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, value = given.split("=")
    found = list(Hps.Config(**{name: value}).missing("rewards.hps"))
    assert found == [] if said is None else found[0].startswith(f"rewards.hps.{said}")


def test_the_word_for_the_packages_own_model_is_no_path(monkeypatch):
    monkeypatch.chdir(ROOT / "align_cluster")  # which has a folder `embedded`
    assert not list(REWARDS["clip_score"].Config().missing("rewards.clip"))


@pytest.mark.parametrize(
    ("command", "file", "setting"),
    [
        ("validate", "embedded_srpo.yaml", "rewards.clip.path"),
        ("validate", "sd15_draft.yaml", "rewards.hps.path"),
        ("serve-rewards", "rewards_service.yaml", "rewards.clip.path"),
    ],
)
def test_the_commands_say_so_at_once(monkeypatch, capsys, command, file, setting):
    monkeypatch.chdir(ROOT)
    assert main([command, f"configs/{file}", "--set", f"{setting}=/nowhere"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {setting} is /nowhere, which is no ")
