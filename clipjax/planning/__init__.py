"""What a run will need and how fast it may go, found by compiling its step for accelerators that are not here.

`targets` describes the machines, `traffic` and `timing` read a compiled step, `memory` says what fills a chip, `report`
puts it together and prints it.
"""
