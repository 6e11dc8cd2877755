"""Where to start: one file for each way to train. See README.md."""
