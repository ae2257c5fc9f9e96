"""ADD A REWARD HERE: write one file with a class like Jpeg, and add one line below."""

from align_cluster.kinds import Kinds
from align_cluster.rewards.aesthetic import Aesthetic
from align_cluster.rewards.clip_score import ClipScore
from align_cluster.rewards.geneval import GenEval
from align_cluster.rewards.hps import Hps
from align_cluster.rewards.http import Http
from align_cluster.rewards.image_reward import ImageReward
from align_cluster.rewards.jpeg import Jpeg
from align_cluster.rewards.ocr import Ocr
from align_cluster.rewards.open_clip_score import OpenClipScore
from align_cluster.rewards.pickscore import PickScore
from align_cluster.rewards.sgp import Sgp

REWARDS = Kinds(
    {
        "geneval": GenEval,
        "clip_score": ClipScore,
        "open_clip_score": OpenClipScore,
        "pickscore": PickScore,
        "jpeg": Jpeg,
        "ocr": Ocr,
        "hps": Hps,
        "aesthetic": Aesthetic,
        "image_reward": ImageReward,
        "sgp": Sgp,
        "http": Http,
    }
)
