"""A framework for pretraining GPT models: its own model, data and loop; DeepSpeed's engines."""
