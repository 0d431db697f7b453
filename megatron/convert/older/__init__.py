"""Checkpoints of Megatron-LM and Megatron-DeepSpeed, read without running anything that they hold."""
