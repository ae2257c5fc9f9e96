"""ADD A BACKBONE HERE: write one file with a class like SD3, and add one line below."""

from align_cluster.backbones.flux import Flux
from align_cluster.backbones.qwen_image import QwenImage
from align_cluster.backbones.sd1 import SD1
from align_cluster.backbones.sd3 import SD3
from align_cluster.kinds import Kinds

BACKBONES = Kinds({"sd3": SD3, "flux": Flux, "sd1": SD1, "qwen_image": QwenImage})
