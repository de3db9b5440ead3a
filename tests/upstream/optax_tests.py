"""Optax's own tests with every optimizer in a silent guard: python tests/upstream/optax_tests.py [pytest's arguments].

Optax ships them. `exceptions.txt` lists those that are left out, each with its reason; more than 5 % are too many.
`EVERY=10` in the environment takes each tenth, for a quick look. Programs are compiled quickly (tests/compiling.py).
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import optax

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from compiling import quick_flags  # noqa: E402 (which lies one folder up)

SOURCE = Path(optax.__file__).parent
MODULES = [
    *(f"optax._src.{name}_test" for name in ("alias", "combine", "lookahead", "float64", "sharding")),
    *(
        f"optax.{part}.{path.stem}"
        for part in ("transforms", "contrib")
        for path in sorted((SOURCE / part).glob("*_test.py"))
    ),
]
RUNS = {"optimizers": MODULES, "transform": ["optax._src.transform_test"]}
MOST_LEFT_OUT = 0.05


def main(arguments: list[str]) -> int:
    """Runs all, and counts what was left out."""
    status, total, left_out = 0, 0, 0
    for guarded, modules in RUNS.items():
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "guard_every_optimizer",
            "-p",
            "no:cacheprovider",
            "--noconftest",
        ]
        command += ["-c", os.devnull, "--rootdir", str(SOURCE), "--pyargs", *modules, *arguments]
        path = os.pathsep.join([str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
        flags = " ".join([os.environ.get("XLA_FLAGS", ""), *quick_flags()])
        environment = {**os.environ, "PYTHONPATH": path, "GUARDED": guarded, "XLA_FLAGS": flags}
        run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for line in run.stdout or ():
            print(line, end="", flush=True)
            status = status or int(line.startswith("FAILED"))
            if count := re.match(r"(\d+) tests, (\d+) of them left out", line):
                total, left_out = total + int(count[1]), left_out + int(count[2])
        status = run.wait() or status
    print(f"{left_out} of {total} tests left out")
    whole = os.environ.get("EVERY", "1") == "1"  # a sample may by chance hold more of them
    return status or int(whole and left_out > MOST_LEFT_OUT * total)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
