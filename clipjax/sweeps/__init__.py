"""Sweeps of many runs: the search, its trials, their processes or jobs, and their ranking. Free of JAX.

A sweep file imports its names from here.
"""

from clipjax.sweeps.space import Choice, Distribution, Grid, IntUniform, LogUniform, RandomSearch, Sweep, Uniform

__all__ = ["Choice", "Distribution", "Grid", "IntUniform", "LogUniform", "RandomSearch", "Sweep", "Uniform"]
