"""Trainers of Transformers and TRL."""
