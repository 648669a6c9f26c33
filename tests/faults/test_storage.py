"""The library of broken storage: each fault gives its error, below its folder alone."""

import subprocess
import sys

import pytest

from tests.faults.storage import FAULTS, BrokenStorage

PROGRAM = """
import os
for place in (INSIDE, BESIDE):
    try:
        os.mkdir(place + "/folder")
        with open(place + "/file", "w") as file:
            file.write("x" * 2000)
            file.flush()
            os.fsync(file.fileno())
        os.rename(file.name, file.name + "2")
        print("done")
    except OSError as error:
        print(error.errno)
"""


@pytest.mark.skipif(not BrokenStorage.is_possible(), reason="no C compiler is here")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_happens_below_its_folder_alone(tmp_path, fault):
    inside, beside = tmp_path / "in", tmp_path / "in.beside"
    inside.mkdir()
    beside.mkdir()
    storage = BrokenStorage(inside, tmp_path)
    program = PROGRAM.replace("INSIDE", repr(str(inside))).replace("BESIDE", repr(str(beside)))
    environment = storage.environment()
    storage.start(fault)
    done = subprocess.run(
        (sys.executable, "-S", "-c", program), env=environment, capture_output=True, text=True, check=False
    )
    call, value = FAULTS[fault]
    assert done.stdout.split() == ["done" if call == "slow" else str(value), "done"], done
