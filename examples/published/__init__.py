"""The published experiments: GRPO against a learned reward model, against an LLM judge, and their evaluation."""
