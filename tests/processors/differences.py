"""How far numbers and merged bits are from one setting of `matrix` to another.

    PYTHONPATH=tests python -m processors.differences

Prints the table of docs/processors.md, every column against the machine as it is: the largest difference of an entry of
a float32 product; of singular values of a converged head, relative to σ₁; the error of the spectral norm of a constant
matrix, against the formula; the largest difference of drifts and angles, relative to the largest; and how many of
1,048,576 merged elements (four kinds) differ, per dtype.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from processors.matrix import SETTINGS, environment, settings

KINDS = ("lora", "dora", "duallora", "d2lora")
CHILD = f"""
import sys, numpy as np, torch
torch.set_num_threads(1)
sys.path.insert(0, "tests")
from kinds import make, normal
from d2surgery.files.tensors import rounded
from d2surgery.measures.dense import head_tail
from d2surgery.measures.drift import delta_drift
found = {{}}
A, B = normal(300, 310, seed=0).float(), normal(310, 300, seed=1).float()
found["product"] = (A @ B).double().numpy()
graded = (normal(400, 30, seed=2) * 0.8 ** torch.arange(30)) @ normal(30, 500, seed=3)
found["head"] = head_tail(graded.float()).singular_values.numpy()[:10]
found["constant"] = np.array([head_tail(torch.full((300, 310), 0.5)).spectral_norm])
W = 0.02 * normal(512, 512, seed=4)
for kind in {KINDS}:
    adapter = make(kind, W, rank=8, size=0.05)
    moved = delta_drift(adapter, W.bfloat16())
    found["drift " + kind] = torch.cat([moved.drift, moved.angle]).numpy()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        work = torch.float64 if dtype == torch.float32 else torch.float32
        base = W.to(dtype).to(work)
        tile = adapter.over_tiles(work).merged(base.clone(), out=slice(0, 512))
        found[f"merge {{kind}} {{dtype}}"] = rounded(tile, dtype).double().numpy()
np.savez(sys.argv[1], **found)
"""


def numbers(name: str, folder: Path) -> dict[str, Any]:
    path = folder / f"{abs(hash(name))}.npz"
    subprocess.run([sys.executable, "-c", CHILD, str(path)], env=environment(SETTINGS[name]), check=True)
    return dict(np.load(path))


def row(name: str, found: dict[str, Any], usual: dict[str, Any]) -> str:
    def off(key: str) -> float:
        return float(np.abs(found[key] - usual[key]).max())

    def elements(dtype: str) -> int:
        return sum(int((found[key] != usual[key]).sum()) for key in usual if key.endswith(dtype))

    drifts = max(off(key) / float(np.abs(usual[key]).max()) for key in usual if key.startswith("drift"))
    graded = off("head") / float(usual["head"][0])
    constant = float(np.abs(found["constant"] / (0.5 * np.sqrt(300 * 310)) - 1).max())
    cells = [f"{off('product'):.0e}", f"{graded:.0e}", f"{constant:.0e}", f"{drifts:.0e}"]
    cells += [str(elements(dtype)) for dtype in ("bfloat16", "float16", "float32")]
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        usual = numbers("as it is", Path(folder))
        for name, _ in settings(list(SETTINGS)):
            print(row(name, numbers(name, Path(folder)), usual), flush=True)


if __name__ == "__main__":
    main()
