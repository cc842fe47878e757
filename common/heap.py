"""Bounds what a process keeps of freed memory where tensors lie in it: on a machine without GPU."""

import ctypes

import torch

TRIM_EVERY = 10  # steps: what is given back must be mapped again, which takes 40 ms on the toy


def trim_heap(step: int) -> None:
    """Give freed memory back to the machine after each TRIM_EVERY-th step; not where a GPU is.

    torch asks the C library for aligned memory. Before glibc 2.38 that rarely fits into what has
    been freed (its bug 14581): a trainer's heap would grow at every step, by megabytes on the toy.
    """
    if step % TRIM_EVERY == 0 and not torch.cuda.is_available():
        ctypes.CDLL(None).malloc_trim(0)
