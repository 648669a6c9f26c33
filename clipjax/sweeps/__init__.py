"""Many runs: what a sweep tries, its trials, where they run, and their ranking. Free of JAX.

A sweep file imports what it needs from here.
"""

from clipjax.sweeps.space import Choice, Distribution, Grid, IntUniform, LogUniform, RandomSearch, Sweep, Uniform

__all__ = ["Choice", "Distribution", "Grid", "IntUniform", "LogUniform", "RandomSearch", "Sweep", "Uniform"]
