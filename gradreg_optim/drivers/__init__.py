"""What is run at each point of a step. A closure and a ``for`` loop need nothing; micro-batches do."""
