"""ADD AN ALGORITHM HERE: write one file with a class like GRPO, and add one line below."""

from align_cluster.algorithms.draft import DRaFT
from align_cluster.algorithms.grpo import GRPO
from align_cluster.algorithms.nft import NFT
from align_cluster.algorithms.ppo import PPO
from align_cluster.algorithms.refl import ReFL
from align_cluster.algorithms.srpo import SRPO
from align_cluster.kinds import Kinds

ALGORITHMS = Kinds({"grpo": GRPO, "nft": NFT, "ppo": PPO, "srpo": SRPO, "refl": ReFL, "draft": DRaFT})
