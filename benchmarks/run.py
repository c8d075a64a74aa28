"""`python benchmarks/run.py ...`, from any folder, for `python -m benchmarks.suite ...`."""

import os
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    paths = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    sys.exit(subprocess.run([sys.executable, "-m", "benchmarks.suite", *sys.argv[1:]], env=environment).returncode)
