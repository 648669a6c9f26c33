"""Faults: runs that are broken on purpose, and what must be left of them. `make chaos` runs all of it.

Reading order: `tiny_run` (a run of 200 steps, and its comparison with the undisturbed one), `kill_points` (moments
inside a save), `crash` (kill -9 again and again), `chaos` (everything, with a table). Every fault is a few lines, drawn
from a seed; a part of them runs in `make test`.
"""
