"""Hugging Face checkpoints in and out, and bridges to and from `nn.Module`."""
