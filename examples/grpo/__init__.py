"""GRPO on verifiable tasks with a regularized optimizer: the demo of ``make demo``."""
