"""The main job in minutes on a CPU: train a small Hope, let it read, restart it, compare, report.

nestling demo [--quick] [--out runs]        the same as nestling.demo.run("runs")
"""

from nestling.demo.results import Results
from nestling.demo.run import Demo, run

__all__ = ["Demo", "Results", "run"]
