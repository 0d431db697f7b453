"""Models in the format of Hugging Face's transformers library: in and out, a tensor at a time, without running code."""
