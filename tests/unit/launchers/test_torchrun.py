"""How launchers/torchrun.sh uses the environment. tests/integration starts it as two nodes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[3] / "launchers" / "torchrun.sh"

TORCHRUN = f"""#!/bin/bash
# Like torchrun as far as these tests go: it sets OMP_NUM_THREADS, and it starts Python unless it must not.
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-1}}"
program=({sys.executable})
while [[ $1 == --* ]]; do
    if [[ $1 == --no-python ]]; then program=(); else shift; fi
    shift
done
exec "${{program[@]}}" "$@"
"""
PRETRAIN = """import os, sys
print(os.environ.get("OMP_NUM_THREADS"), os.environ.get("PYTHONPATH"), *sys.argv[1:])
"""


def run(folder, **variables):
    """Return the number of threads, PYTHONPATH and the arguments of a rank."""
    for name, text in {"bin/torchrun": TORCHRUN, "a checkout/launchers/pretrain.py": PRETRAIN}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    shutil.copy(SCRIPT, folder / "a checkout" / "launchers")
    path = f"{folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [folder / "a checkout" / "launchers" / "torchrun.sh", "--config", "c.yaml"]
    result = subprocess.run(command, env={"PATH": path, **variables}, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.rsplit(maxsplit=2)


def test_thread_count_is_not_set_and_code_comes_from_the_checkout(tmp_path):
    checkout, arguments = f"{tmp_path}/a checkout", ["--config", "c.yaml"]
    assert run(tmp_path) == [f"None {checkout}", *arguments]
    variables = {"OMP_NUM_THREADS": "3", "PYTHONPATH": "/elsewhere"}
    assert run(tmp_path, **variables) == [f"3 {checkout}:/elsewhere", *arguments]
