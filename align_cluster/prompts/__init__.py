"""Prompt sources by kind. To add one, write a file with a class like these and add one line below."""

from align_cluster.kinds import Kinds
from align_cluster.prompts.embedded import EmbeddedPrompts
from align_cluster.prompts.files import JsonlPrompts, TextPrompts
from align_cluster.prompts.geneval import GenevalPrompts
from align_cluster.prompts.images import ImagePrompts

PROMPTS = Kinds(
    {
        "embedded": EmbeddedPrompts,
        "txt": TextPrompts,
        "jsonl": JsonlPrompts,
        "geneval": GenevalPrompts,
        "images": ImagePrompts,
    }
)
