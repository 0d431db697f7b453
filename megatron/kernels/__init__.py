"""Fused operations beside their plain-torch twins; each says what it can do and why it is missing here."""
