"""Test-time training: a memory with a norm inside, trained by gradient descent on the tokens that it reads."""

from nestling.ops.ttt import chunk, reference

__all__ = ["chunk", "reference"]
