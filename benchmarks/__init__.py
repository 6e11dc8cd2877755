"""Measurements, a folder for each question. See README.md."""
