"""Benchmarks of the repository: README.md. Threads that wait sleep, or their spinning would count as time."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded
