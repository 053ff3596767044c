"""Kill all that runs on one of two hosts with SIGKILL at random moments, and start it again: the job goes on.

    python -m tests.train.host_kill_drill --kills 5

A job under `torchrun --nnodes 2 --max-restarts 3`, one rank on each host (`two_hosts.py`: Linux, root). It is the
second host that dies, agent and rank, for the first has the rendezvous. The rank that is left ends, its agent waits for
the other host, and both go on from the newest whole checkpoint. Compared with a job without any kill: every loss, and
the bits of the last weights. One line per kill; --log FILE writes them as JSON.

TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, because in torch 2.13 agents that share their store with the ranks keep its
address to themselves, and a host that comes later waits for it in vain.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nestling.train import config_to_json
from tests.train.distributed_kill_drill import SIZE, Kill, arguments, compare, config_of, moment, report
from tests.train.small_runs import with_train
from tests.train.two_hosts import Host, two_hosts

STEPS, RESTARTS, PATIENCE, PORT = 30, 3, 600.0, 29_500


def start(hosts: tuple[Host, Host], index: int, config: Path, folder: Path) -> subprocess.Popen[bytes]:
    """The agent of torchrun on one of the hosts, and its rank."""
    host = hosts[index]
    torchrun = ["torch.distributed.run", "--nnodes", str(SIZE), "--nproc-per-node", "1"]
    torchrun += ["--max-restarts", str(RESTARTS), "--monitor-interval", "0.1", "--rdzv-backend", "c10d"]
    torchrun += ["--rdzv-id", folder.name, "--rdzv-endpoint", f"{hosts[0].address}:{PORT}"]
    torchrun += ["--rdzv-conf", f"is_host={index == 0}", "--local-addr", host.address]
    train = ["nestling", "train", "--config", str(config), "--out", str(folder)]
    env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return host.start([sys.executable, "-m", *torchrun, "-m", *train], log_of(folder, index), env)


def log_of(folder: Path, index: int) -> Path:
    return folder.parent / f"{folder.name}-host{index}.log"


def end(agents: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """Wait until both agents are done, well."""
    for agent in agents:
        try:
            code = agent.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            code = -1
        assert code == 0, "\n".join(f"host {i}: {log_of(folder, i).read_text()[-4000:]}" for i in range(SIZE))


def killed(hosts: tuple[Host, Host], config: Path, folder: Path, run: int, steps: list[int]) -> list[Kill]:
    """A job whose second host dies after each of these steps, and is started again each time."""
    agents = [start(hosts, index, config, folder) for index in range(SIZE)]
    done: list[Kill] = []
    for step in steps:
        began = time.monotonic()
        while steps_of(folder) < step and all(agent.poll() is None for agent in agents):
            time.sleep(0.05)
        hosts[1].crash()
        agents[1].wait()
        done.append(moment(folder, run, 1, time.monotonic() - began))
        agents[1] = start(hosts, 1, config, folder)
    end(agents, folder)
    return done


def steps_of(folder: Path) -> int:
    """Lines of the metrics so far."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def drill(kills: int, seed: int, folder: Path) -> list[Kill]:
    """All kills."""
    moments, config, done, run = random.Random(seed), folder / "config.json", list[Kill](), 0
    config.write_text(config_to_json(with_train(config_of(), steps=STEPS)))
    with two_hosts() as hosts:
        end([start(hosts, index, config, folder / "whole") for index in range(SIZE)], folder / "whole")
        while len(done) < kills:
            run += 1
            target = folder / f"killed-{run}"
            steps = sorted(moments.randrange(STEPS) for _ in range(min(RESTARTS, kills - len(done))))
            done += killed(hosts, config, target, run, steps)
            compare(folder / "whole", target)
    return done


def main() -> None:
    chosen = arguments(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        kills = drill(chosen.kills, chosen.seed, Path(folder))
        report("torchrun on two hosts, the second killed and started again", kills, Path(folder) / "whole", chosen.log)


if __name__ == "__main__":
    main()
