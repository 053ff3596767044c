"""Guard: which steps are good, and what follows when they are not.

A bad step's update is left out. If that repeats, the weights themselves are at fault: the run goes back to its last
checkpoint and reads on behind the text where it happened. If that repeats too, the run stops.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

from nestling.train.config import GuardConfig

WINDOW, LEAST = 50, 10  # good steps that the usual norm is taken from, and from how many on it is known


class Guard:
    """Judges every step by its loss and gradient norm, which are the same on every rank."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.norms: deque[float] = deque(maxlen=WINDOW)  # of the last good steps
        self.bad = 0  # steps in a row
        self.rollbacks = 0
        self.fault = ""  # of the last step

    def judge(self, loss: float, norm: float) -> bool:
        """Whether the step is good. Remembers the fault if it is not."""
        self.fault = self._fault(loss, norm)
        self.bad = self.bad + 1 if self.fault else 0
        if not self.fault:
            self.norms.append(norm)
        return not self.fault

    def _fault(self, loss: float, norm: float) -> str:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"loss {loss} and gradient norm {norm}"
        if len(self.norms) >= LEAST and norm > self.config.spike * median(self.norms):
            return f"gradient norm {norm:.3g}, {norm / median(self.norms):.0f} times the usual one"
        return ""

    @property
    def exhausted(self) -> bool:
        """Whether leaving steps out has not helped."""
        return self.bad > self.config.skips

    @property
    def gives_up(self) -> bool:
        """Whether going back has not helped either."""
        return self.exhausted and self.rollbacks >= self.config.rollbacks

    def went_back(self, before: int) -> None:
        """The run is at its last checkpoint again, for the `before` + 1-th time."""
        self.bad, self.rollbacks = 0, before + 1

    def state_dict(self) -> dict[str, Any]:
        return {"norms": list(self.norms), "bad": self.bad, "rollbacks": self.rollbacks}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.norms = deque(saved["norms"], maxlen=WINDOW)
        self.bad, self.rollbacks = saved["bad"], saved["rollbacks"]
