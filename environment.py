"""Make the environment `.venv` beside this file, once: `python3 environment.py EXTRA...`.

Checks first what would stop the installation half-way, and says it in one line. An environment that is complete is
used again; the stamp in it is keyed on pyproject.toml, constraints.txt and this folder. Standard library only, and
in the syntax of old Pythons, so that these can be told that they are too old.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.abspath(__file__))
VENV = os.path.join(ROOT, ".venv")
PYTHON = os.path.join(VENV, "bin", "python")
STAMP = os.path.join(VENV, "nestling-environment.json")
OLDEST = (3, 11)
DISK_GB = 4
KERNELS = "kernels-test"  # triton for the interpreter; a CUDA build of torch brings the one triton it can work with
PROBE = "iniconfig"  # a few kilobytes, from wherever pip is configured to look


def python_problem(version):
    """What is wrong with this interpreter's version (major, minor), or None."""
    if tuple(version) >= OLDEST:
        return None
    found, wanted = ".".join(map(str, version)), ".".join(map(str, OLDEST))
    return "Python is %s; Nestling needs %s or newer: run `make PYTHON=/path/to/python3.12 ...`" % (found, wanted)


def venv_problem(find_spec):
    """What is missing to make virtual environments, or None. Some systems ship Python without them."""
    for name in ("venv", "ensurepip"):
        if find_spec(name) is None:
            return (
                "Python's module %s is missing: install it (Debian, Ubuntu: apt install python3-venv), "
                "or run `make PYTHON=/path/to/a/complete/python3 ...`" % name
            )
    return None


def disk_problem(free_bytes):
    """What is wrong with the free disk space at the root, or None."""
    if free_bytes >= DISK_GB * 10**9:
        return None
    return "only %.1f GB of disk are free in %s; the environment needs %d GB: free some, or move the checkout" % (
        free_bytes / 1e9,
        ROOT,
        DISK_GB,
    )


def network_problem(call):
    """What keeps pip from its package index, or None. `call(command)` returns the exit status, printing nothing."""
    probe = [PYTHON, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--retries", "0", "--timeout", "20"]
    if call(probe + ["--dest", os.path.join(VENV, "probe"), PROBE]) == 0:
        return None
    return (
        "no network: pip cannot fetch packages from its index; connect, or set pip's index or proxy "
        "(try: %s -m pip download %s)" % (os.path.relpath(PYTHON, ROOT), PROBE)
    )


def key():
    """A digest of all that decides what gets installed and where."""
    digest = hashlib.sha256(ROOT.encode())
    for name in ("pyproject.toml", "constraints.txt"):
        with open(os.path.join(ROOT, name), "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def installed_extras():
    """The extras of a complete, current environment; None if there is none."""
    try:
        with open(STAMP) as file:
            stamp = json.load(file)
        current = stamp["key"] == key() and quiet([PYTHON, "-c", "import torch.version, numpy, safetensors"]) == 0
        return set(stamp["extras"]) if current else None
    except (OSError, ValueError, KeyError):
        return None


def quiet(command):
    """Exit status of a command whose output nobody needs; 127 if it cannot be started."""
    try:
        with open(os.devnull, "w") as nothing:
            return subprocess.call(command, stdout=nothing, stderr=nothing, cwd=ROOT)
    except OSError:
        return 127


def stop(problem):
    """End with one line on stderr if there is a problem."""
    if problem:
        sys.exit("nestling: " + problem)


def make(extras):
    """Check, make `.venv`, install the package with `extras`, and stamp it as complete."""
    stop(venv_problem(importlib.util.find_spec) or disk_problem(shutil.disk_usage(ROOT).free))
    if quiet([PYTHON, "-m", "pip", "--version"]) != 0:
        stop(subprocess.call([sys.executable, "-m", "venv", "--clear", VENV]) and "could not make " + VENV)
    stop(network_problem(quiet))
    shutil.rmtree(os.path.join(VENV, "probe"), ignore_errors=True)
    sys.stdout.write("nestling: installing into .venv (a few minutes, once)\n")
    sys.stdout.flush()
    install(extras - {KERNELS})
    if KERNELS in extras and quiet([PYTHON, "-c", "import triton"]) != 0:
        install(extras)
    with open(STAMP, "w") as file:
        json.dump({"key": key(), "extras": sorted(extras)}, file)


def install(extras):
    """pip install the package, editable, with these extras."""
    wanted = ".[%s]" % ",".join(sorted(extras)) if extras else "."
    pip = [PYTHON, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "-c", "constraints.txt"]
    stop(subprocess.call(pip + ["-e", wanted], cwd=ROOT) and "the installation failed: pip's message is above")


def main(arguments):
    """Make the environment unless a complete one with all these extras is there."""
    stop(python_problem(sys.version_info[:2]))
    have = installed_extras()
    if have is None or not set(arguments) <= have:
        make(set(arguments) | (have or set()))


if __name__ == "__main__":
    main(sys.argv[1:])
