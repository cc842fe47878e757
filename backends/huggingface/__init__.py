"""Hugging Face folders: what their config means, what their tensors are called, how they are read."""
