"""Floor 4: the training loop, what it reports, when it stops and what it keeps."""
