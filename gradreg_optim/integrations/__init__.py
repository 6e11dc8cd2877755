"""Plugins for training stacks; each file names the version of the stack with which it was run."""
