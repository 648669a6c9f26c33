"""Linear probe beside scikit-learn, in an environment of its own, on the raw pixels of its digits: counts, not times.

    python -m benchmarks.parity.probe --peer_python=PEER/bin/python [--output=benchmarks/results/parity_probe.json]

PEER needs scikit-learn alone. The peer's split and its predictions come back as a file of arrays.
"""

import argparse
import json
import pathlib
import subprocess
import tempfile

import numpy as np

from clipjax.evals.probe import Problem

STRENGTHS = tuple(10.0**power for power in range(-6, 7, 2))

PEER = """
import sys
import numpy as np
import sklearn
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

x, y = load_digits(return_X_y=True)
train, test, train_y, test_y = train_test_split(x / 16, y, test_size=0.3, random_state=0, stratify=y)
def chosen(solver, tol):
    fits = (LogisticRegression(C=float(c), solver=solver, max_iter=3000, tol=tol) for c in sys.argv[2:])
    return [each.fit(train, train_y).predict(test) for each in fits]
# Newton's method finds the minimum to float64's precision; L-BFGS in float64 stops before it on what it tells apart.
arrays = {"lbfgs": chosen("lbfgs", 1e-6), "newton": chosen("newton-cholesky", 1e-12)}
arrays |= {"train": train, "test": test, "train_y": train_y, "test_y": test_y}
np.savez(sys.argv[1], version=sklearn.__version__, **arrays)
"""


def compare(peer_python: str) -> dict:
    """Return by strength how many test examples each side gets right, and on how many they differ."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "peer.npz"
        subprocess.run([peer_python, "-W", "ignore", "-c", PEER, str(path), *map(str, STRENGTHS)], check=True)
        with np.load(path, allow_pickle=False) as content:
            peer = dict(content)
    problem, rows = Problem(peer["train"].astype(np.float32), peer["train_y"]), []
    for strength, exact, theirs in zip(STRENGTHS, peer["newton"], peer["lbfgs"], strict=True):
        fitted = problem.fit(strength)
        ours = fitted.predict(peer["test"].astype(np.float32))
        rows.append(
            {
                "c": strength,
                "clipjax_right": int((ours == peer["test_y"]).sum()),
                "scikit_learn_right": int((exact == peer["test_y"]).sum()),
                "differ": int((ours != exact).sum()),
                "scikit_learn_lbfgs_differs": int((theirs != exact).sum()),
                "converged": fitted.converged,
                "steps": fitted.steps,
            }
        )
    return {"scikit_learn": str(peer["version"]), "num_test": len(peer["test_y"]), "strengths": rows}


def main() -> None:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer_python", required=True)
    parser.add_argument("--output", default="benchmarks/results/parity_probe.json")
    options = parser.parse_args()
    text = json.dumps(compare(options.peer_python), indent=2)
    pathlib.Path(options.output).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
