"""The GPT: a list of stages made of parallel layers, and what is computed over it."""
