"""Learning rate and weight decay of the quickstart: a 3 x 2 grid.

clipjax sweep --config=configs/quickstart.py --sweep=configs/sweeps/quickstart_lr.py --workdir=runs/quickstart_lr
"""

from clipjax.sweeps import Grid, Sweep


def get_sweep() -> Sweep:
    """Six trials, ranked by zero-shot accuracy on scenes that were not trained on."""
    return Sweep(
        search=Grid({"optim.learning_rate": [3e-4, 1e-3, 3e-3], "optim.weight_decay": [0.05, 0.2]}),
        metric="scenes/val:top1",
    )
