"""Peak memory of a step beside TorchDEQ's: `python benchmarks/memory.py`.

Every row is a process of its own, on Linux: what the resident set rises above that of the loaded
model during the second of two steps. MDEQ's LARGE size of CIFAR, 32 pictures, float32 unless the
row says otherwise, five Anderson steps, no optimizer; TorchDEQ drives the same map with the same
settings. The last rows are of forwards without gradients, by number of solver steps: TINY, 16
pictures. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import markdown_table, write_results
from training import SIZES

from deqzoo.models.mdeq.configuration_mdeq import MDEQConfig
from deqzoo.models.mdeq.modeling_mdeq import MDEQForImageClassification

SOLVER = {"name": "anderson", "max_steps": 5, "tol": 0.0}
UPG = {"name": "upg", "steps": 5, "damping": 0.5}
IMPLICIT = {"name": "implicit", "solver": SOLVER}
ROWS: dict[str, dict[str, Any]] = {
    "deqzoo, UPG(5)": {"gradient": UPG},
    "TorchDEQ, UPG(5)": {"theirs": {"grad": 5, "tau": 0.5}},
    "deqzoo, implicit": {"gradient": IMPLICIT},
    "TorchDEQ, implicit": {"theirs": {"ift": True, "b_solver": "anderson", "b_max_iter": 5}},
    "deqzoo, UPG(5), bf16": {"gradient": UPG, "bf16": True},
    "deqzoo, implicit, bf16": {"gradient": IMPLICIT, "bf16": True},
    **{
        f"deqzoo, {name}, {steps} steps without gradients": {
            "solver": {"name": name, "max_steps": steps, "tol": 0.0}
        }
        for name in ("anderson", "broyden")
        for steps in (5, 20, 100)
    },
}


def step_of(row: dict[str, Any]) -> Callable[[], None]:
    """The step that a row is about, on a model that is loaded."""
    torch.manual_seed(0)
    training = "solver" not in row
    size, batch = ("LARGE", 32) if training else ("TINY", 16)
    model = MDEQForImageClassification(MDEQConfig.from_preset(SIZES[size])).train(training)
    pixels, labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    if row.get("bf16"):
        model = model.to(memory_format=torch.channels_last)
        model.use_native_norm()
    if "theirs" in row:
        from torchdeq import get_deq

        deq = get_deq(f_solver="anderson", f_max_iter=5, f_tol=0.0, m=6, **row["theirs"])

    def loss() -> torch.Tensor:
        if "theirs" not in row:
            with torch.autocast("cpu", torch.bfloat16, enabled=row.get("bf16", False)):
                return model(pixels, labels=labels, solver=SOLVER, gradient=row["gradient"]).loss
        f, state = model.equilibrium_map(pixels)
        found, _ = deq(lambda *z: f(z), state)
        logits = model.classifier(model.head(tuple(found[-1])))
        return torch.nn.functional.cross_entropy(logits, labels)

    def train() -> None:
        loss().backward()
        model.zero_grad()

    @torch.no_grad()
    def infer() -> None:
        model(pixels, solver=row["solver"])

    return train if training else infer


def rise(row: dict[str, Any]) -> float:
    """MiB above the loaded model at the peak of a step, in this process."""
    torch.set_num_threads(1)
    step = step_of(row)
    loaded = _status("VmRSS")
    step()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    step()
    return (_status("VmHWM") - loaded) / 1024


def _status(name: str) -> int:
    """KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise LookupError(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--row", choices=ROWS, help="measure one, in this process")
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(rise(ROWS[arguments.row])))
        return
    rows = []
    for name in ROWS:
        command = [sys.executable, __file__, "--row", name]
        found = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
        rows.append({"row": name, "MiB": json.loads(found.stdout.splitlines()[-1])})
        print(rows[-1], flush=True)
    table = markdown_table(["step", "MiB above the model"], [[r["row"], r["MiB"]] for r in rows])
    text = f"Resident set at the peak of a step; one process a row, one thread.\n\n{table}"
    write_results(arguments.output, "memory", {"rows": rows}, text)


if __name__ == "__main__":
    main()
