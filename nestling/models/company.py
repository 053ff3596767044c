"""Company: processes that hold the weights of a model together, and so have to run the same passes in the same order.

Where a block's weights are gathered for each of its passes (`parallel.reshard`), a pass is an exchange that every rank
takes part in. What a reader does next depends on its rows, though: where a document ends, which level is full, whether
a segment has to be read again. So readers in company agree on it before every piece. How a text is cut changes nothing
of what is computed, rounding apart.
"""

from __future__ import annotations


class Company:
    """One process alone, which agrees with itself. `nestling.train.parallel.reshard` has the one of many.

    Attributes:
        share: what the sum of the token losses counts in the gradient of the parameters, which backward passes then
            add to `.grad` as they go; None = the reader collects gradients and hands them over at the end.
    """

    share: float | None = None

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is True in any process."""
        return list(flags)

    def least(self, number: int) -> int:
        """The smallest number of all processes."""
        return number


ALONE = Company()
