"""Runs that follow a law, as arrays, as a table and as run folders, for tests of the scaling law."""

import csv
import json

import numpy as np

from eval.runs.law.law import Law
from eval.scaling_law import main

TRUE = Law.of(A=406.4, alpha=0.34, E=1.69, B=410.7, beta=0.28)
SIZES = (1e6, 3e6, 1e7, 4e7, 1.5e8, 4e8)
TOKENS = (2e7, 1e8, 1e9, 1e10)
AVERAGE_DENSITY = {0.0: 1.0, 0.2: 0.89, 0.4: 0.77, 0.6: 0.61, 0.8: 0.4}


def grid(sizes=SIZES, tokens=TOKENS):
    return tuple(axis.ravel() for axis in np.meshgrid(np.array(sizes, float), np.array(tokens, float)))


def noisy(law, params, tokens, noise, seed=0):
    return law.loss(params, tokens) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(params)))


def series(
    law, *, by="avg_linear_params", noise=0.002, sizes=(2e6, 2e7, 2e8), tokens=(2e8, 2e9, 2e10), levels=AVERAGE_DENSITY
):
    """Return rows of runs whose loss follows a law of their average or of their final parameters."""
    rng = np.random.default_rng(0)
    rows = []
    for size in sizes:
        for amount in tokens:
            for sparsity in levels:
                row = {
                    "avg_linear_params": size * AVERAGE_DENSITY[sparsity],
                    "final_linear_params": size * (1 - sparsity),
                }
                loss = float(law.loss(row[by], amount)) * np.exp(noise * rng.standard_normal())
                rows.append(
                    {"run_name": f"r{len(rows)}", **row, "total_tokens": amount, "loss": loss, "sparsity": sparsity}
                )
    return rows


def write_csv(rows, file):
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return file


def write_run(folder, **figures):
    folder.mkdir(parents=True)
    summary = {
        "run_name": folder.name, "data": "pydocs", "avg_linear_params": 4e5, "nonzero_linear_params": 2e5, "sparsity": 0.8,
        "linear_params": 1e6, "total_tokens": 1e7, "final_train_loss": 3.0, "heldout_loss": 3.1, "heldout_tokens": 300,
        "heldout_bytes": 1000,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps({**summary, **figures}))
    return folder


def json_of(capsys, *arguments):
    main([*arguments, "format=json", "figure=null"])
    return json.loads(capsys.readouterr().out)
