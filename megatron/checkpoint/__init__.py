"""Checkpoints: files that hold logical tensors whatever layout wrote them, complete or not there, and run no code."""
