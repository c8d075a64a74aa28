"""Training scripts in several processes, as `accelerate launch` starts them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).parent / "training_distributed.py"


def run(processes: int, scripts: list) -> None:
    """Start the worker as `accelerate launch` would: one process a rank, told apart by environment variables."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = []
    for rank in range(processes):
        ranks = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": processes,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        environment |= {name: str(value) for name, value in ranks.items()} if processes > 1 else {}
        workers.append(
            subprocess.Popen(
                [sys.executable, WORKER, json.dumps(scripts)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    for worker in workers:
        output = worker.communicate(timeout=600)[0]  # a busy machine is slow, not stuck
        assert worker.returncode == 0, output
