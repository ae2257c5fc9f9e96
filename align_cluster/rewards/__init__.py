"""ADD A REWARD HERE: one file with a class like ClipScore, and one line below."""

from align_cluster.rewards.aesthetic import Aesthetic
from align_cluster.rewards.clip_score import ClipScore
from align_cluster.rewards.geneval import GenEval
from align_cluster.rewards.hps import Hps
from align_cluster.rewards.image_reward import ImageReward
from align_cluster.rewards.ocr import Ocr

REWARDS = {
    "geneval": GenEval,
    "clip_score": ClipScore,
    "ocr": Ocr,
    "hps": Hps,
    "aesthetic": Aesthetic,
    "image_reward": ImageReward,
}
