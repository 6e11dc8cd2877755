"""Stands in for torchaudio, whose wheels on PyPI need CUDA: LLaMA-Factory imports it."""
