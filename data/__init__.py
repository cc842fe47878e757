"""Prompts, labels and samples."""
