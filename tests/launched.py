"""Commands in two processes, as torchrun and accelerate launch begin them."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = (  # not --cpu, which begins several processes by mpirun only, and one without it
    "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
)  # fmt: skip


def two_processes(*command: str, launcher: tuple[str, ...] = TORCHRUN) -> str:
    launch = [sys.executable, "-m", *launcher, *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
