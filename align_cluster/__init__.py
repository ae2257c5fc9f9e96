"""align_cluster: align text-to-image diffusion and flow models with rewards, on a Ray cluster or on a laptop."""

__version__ = "0.1.0"
