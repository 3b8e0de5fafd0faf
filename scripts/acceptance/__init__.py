"""Checks of the machine at hand, above all of what only a GPU runs; `scripts/gpu_acceptance.sh` starts them.

`kernels` compares paths that only a GPU takes with slow ones, `runs` trains; `parts` is what both are made
of, and `__main__` runs them, each in a process of its own, and writes the report.
"""
