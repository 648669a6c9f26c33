"""Prediction of a run's needs and speed, by compiling its step for accelerators that this machine lacks.

`targets` describes the accelerators; `hlo` reads the compiled step, `traffic` its collectives, `timing` its seconds,
`memory` the parts of a chip's memory; `report` makes a plan of them; `search` tries many plans, `measure` runs one.
"""
