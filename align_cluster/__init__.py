"""align_cluster: align text-to-image diffusion and flow models with rewards, on a Ray cluster or on a laptop."""

from align_cluster import torchvision_guard

__version__ = "0.1.0"

torchvision_guard.install()  # before anything imports transformers, peft or diffusers
