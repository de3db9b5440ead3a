"""An environment with the compilers of a TPU and a GPU, and `python -m benchmarks.accelerators` in it.

    python3 benchmarks/accelerators/environment.py [--tpu] [--gpu] [arguments of benchmarks.accelerators]

Any Python runs this file; the environment, `.venv-accelerators`, needs Python 3.12, as JAX 0.12 does. A chip's compiler
is installed when it is first asked for: 0.6 GB for the TPU's, 4.9 GB for the GPU's.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / ".venv-accelerators"
PYTHON = HERE / "bin" / "python"
WHEELS = {"--tpu": ("jax[tpu]", "libtpu"), "--gpu": ("jax[cuda12]", "jax_cuda12_plugin")}  # and what it brings
CONSTRAINTS = (ROOT / "constraints.txt", Path(__file__).with_name("constraints.txt"))


def python312() -> str | None:
    """One that answers: a version manager's shim may be on the PATH without a Python behind it."""
    versions = (Path.home() / ".pyenv" / "versions").glob("3.12.*/bin/python3.12")
    candidates = ["python3.12", *sorted(map(str, versions), reverse=True)]
    for each in candidates:
        try:
            subprocess.run([each, "--version"], capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return each
    return None


def installed(module: str) -> bool:
    """In the environment."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([str(PYTHON), "-c", code], check=False).returncode == 0


def install(*packages: str) -> bool:
    """With pip, in the environment; pip says what is wrong where it fails."""
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", *packages]
    for file in CONSTRAINTS:
        command += ["--constraint", str(file)]
    return subprocess.run(command, check=False).returncode == 0


def missing(chips: list[str]) -> str | None:
    """Makes what is not there yet; what cannot be had, in words."""
    if not PYTHON.exists():
        python = python312()
        if python is None:
            return "There is no Python 3.12 here, on the PATH or under ~/.pyenv/versions, and JAX 0.12 needs it."
        print(f"Making {HERE.name} with {python}.", flush=True)
        if subprocess.run([python, "-m", "venv", str(HERE)], check=False).returncode:
            return f"{python} -m venv failed."
    if not installed("flax") and not install("flax", "matplotlib", "optax", "jax"):
        return "pip could not install jax, optax, flax and matplotlib."
    for chip in chips:
        wheel, module = WHEELS[chip]
        if not installed(module):
            print(f"Installing {wheel}.", flush=True)
            if not install(wheel):
                return (
                    f"pip could not install {wheel} (its index has no wheel of it, or the disk is full), so nothing "
                    f"can be compiled for a {chip[2:].upper()}; `ARGS=` chooses one of {', '.join(WHEELS)}."
                )
    return None


def main() -> int:
    """Installs what is missing and hands over."""
    chips = [] if "--write-pages" in sys.argv else [each for each in WHEELS if each in sys.argv] or list(WHEELS)
    problem = missing(chips)
    if problem is not None:
        print(f"make accelerators: {problem}", file=sys.stderr)
        return 1
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [str(PYTHON), "-m", "benchmarks.accelerators", *sys.argv[1:]]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
