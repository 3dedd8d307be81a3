"""Exports a library model by the command line, from a file of its weights, and prints how far its answers are off.

    python check_command.py NAME FACTORY FOLDER

FACTORY is what --model takes: it builds the module untrained, so that answers are right only if the weights of the
file reached it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from check_library_model import answer, arrays, find_model, largest

import te_runtime

ROWS = 7
COMMAND = "from te_export.cli import main; main()"


def main() -> None:
    warnings.simplefilter("ignore")  # torch's own, and the libraries'
    name, factory, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    model = find_model(name)
    torch.save(model.module.state_dict(), folder / "weights.pt")
    example = arrays(model.example_inputs)
    np.savez(folder / "sample.npz", **(example if isinstance(example, dict) else {"inputs": example}))
    bundle = folder / "bundle"
    arguments = [
        str(folder / "weights.pt"),
        "--model",
        factory,
        "--example-input",
        str(folder / "sample.npz"),
    ]
    names = ["--task-names", ",".join(model.task_names)]
    here = Path(__file__).parent  # where --model finds the factory
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments, *names, "-o", str(bundle)],
        cwd=here,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        sys.exit(f"te-export exited with {done.returncode}\n{done.stdout}\n{done.stderr}")
    inputs = model.make_rows(ROWS, 1)
    own = answer(model, model.module, inputs).predictions
    with te_runtime.load(bundle) as loaded:
        found = loaded.predict(arrays(inputs))
    errors = {task: largest(found[task].output - own[task]) / largest(own[task]) for task in model.task_names}
    print(json.dumps({"tasks": list(found), "relative_errors": errors}))


if __name__ == "__main__":
    main()
