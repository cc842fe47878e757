"""Hugging Face folders: what their config means, how their tensors are named, how they are read."""
