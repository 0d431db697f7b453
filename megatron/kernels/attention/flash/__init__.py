"""FlashAttention-2 in Triton: tiles, forward, backward, and the operators around them."""
