"""The learner: a DeepSpeed ZeRO engine over LoRA adapters, blind to which algorithm it runs."""
