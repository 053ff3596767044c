"""Ray on two hosts: `nestling.launch.train_on_ray` with one worker on each, and once with the second host killed.

    python -m tests.launch.two_ray_hosts

The hosts are network namespaces of this machine (`tests/train/two_hosts.py`: Linux, root). Each gives Ray one CPU, so
that the two workers cannot be on the same one. Compared with one process: the loss of every step. In the second run all
that runs on the second host is killed with SIGKILL once some steps are done, and its part of Ray is started again.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nestling.train import run
from tests.launch.test_ray import STEPS, config_of
from tests.train.small_runs import losses
from tests.train.two_hosts import Host, two_hosts

ROOT = Path(__file__).parents[2]
PORT, PATIENCE, TOLERANCE, KILLED_AFTER = 6_379, 900.0, 1e-4, 20
RAY = Path(sys.executable).with_name("ray")


def join(hosts: tuple[Host, Host], index: int, folder: Path) -> subprocess.Popen[bytes]:
    """Ray on one of the hosts, the first of which is its head."""
    host, head = hosts[index], f"{hosts[0].address}:{PORT}"
    role = ["--head", "--port", str(PORT), "--include-dashboard", "false"] if index == 0 else ["--address", head]
    common = ["--node-ip-address", host.address, "--num-cpus", "1", "--disable-usage-stats", "--block"]
    return host.start([str(RAY), "start", *role, *common], folder / f"ray{index}.log", {"PYTHONPATH": str(ROOT)})


def drive(folder: Path) -> None:
    """What runs on the first host, once Ray has both."""
    import ray

    from nestling.launch.ray import train_on_ray

    ray.init(address="auto", runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    until = time.monotonic() + PATIENCE
    while (count := sum(node["Alive"] for node in ray.nodes())) < 2:
        assert time.monotonic() < until, f"{count} of two hosts"
        time.sleep(0.2)
    assert train_on_ray(config_of(), folder, workers=2) == STEPS


def trained(hosts: tuple[Host, Host], folder: Path, *, kill: bool) -> None:
    """One run on both hosts, the second of which may die in the middle."""
    log = folder.with_suffix(".log")
    command = [sys.executable, "-m", "tests.launch.two_ray_hosts", str(folder)]
    driver = hosts[0].start(command, log, {"RAY_ADDRESS": f"{hosts[0].address}:{PORT}", "PYTHONPATH": str(ROOT)})
    metrics = folder / "metrics.jsonl"
    if kill:
        while not metrics.is_file() or metrics.read_bytes().count(b"\n") < KILLED_AFTER:
            assert driver.poll() is None, log.read_text()
            time.sleep(0.05)
        hosts[1].crash()
        join(hosts, 1, folder.parent)
    assert driver.wait(PATIENCE) == 0, log.read_text()[-6000:]


def difference(one: Path, other: Path) -> float:
    """The largest relative difference of a loss or norm."""
    pairs = zip(losses(one), losses(other), strict=True)
    return max(abs(a - b) / abs(b) if b else abs(a) for a, b in pairs)  # 0 stands for "not validated"


def main() -> None:
    if sys.argv[1:]:
        return drive(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory() as name, two_hosts() as hosts:
        folder = Path(name)
        run(config_of(), folder / "alone", say=lambda line: None)
        for index in range(2):
            join(hosts, index, folder)
        for what, kill in (("whole", False), ("killed", True)):
            trained(hosts, folder / what, kill=kill)
            found = difference(folder / what, folder / "alone")
            assert found < TOLERANCE, found
            print(f"two Ray hosts, {what}: {STEPS} steps, losses within {found:.1e} of one process", flush=True)


if __name__ == "__main__":
    main()
