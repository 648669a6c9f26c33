"""The machine: chips, compiler, processes, mesh, files, terminal."""
