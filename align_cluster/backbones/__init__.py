"""ADD A BACKBONE HERE: one file with a class like SD3, and one line below."""

from align_cluster.backbones.sd3 import SD3

BACKBONES = {"sd3": SD3}
