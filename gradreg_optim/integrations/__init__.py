"""Plugins for training stacks that load one; each file names the version of the stack with which it was run."""
