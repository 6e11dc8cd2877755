"""The outside of the wrapper: one optimizer that shares everything with the one inside, and its settings."""
