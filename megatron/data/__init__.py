"""Data: token files, sample order, blends, batches and tokenizers."""
