"""Commands beside the loops."""
