"""Stands in for torchaudio, whose wheels on PyPI need CUDA: LLaMA-Factory imports it, and uses it for audio."""
