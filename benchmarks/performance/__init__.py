"""The performance record: what a guarded step costs, as the median of the ratios of single rounds.

=================  ==================================================================================================
File               What it measures
=================  ==================================================================================================
`steps.py`         a guarded step, each rule, recovery, bounds on the update, noise, exact zeros
`accumulation.py`  one step from four micro-batches, across calls and inside one
`scaling.py`       10 to 3 000 leaves (compiling and stepping), 1 M to 300 M parameters, the import
`waits.py`         how often the host waits for a GPU, counted in a profile
`programs.py`      what the compiled programs need: memory, bytes, kernels; dispatch ahead and bfloat16 on a GPU
`traps.py`         the order of branches and of donated arguments
`training.py`      the guard's share of a real training step
`pytorch.py`       the same tree in PyTorch, if it is installed
`measure.py`       the method: arms, rounds, rows
`page.py`          results -> the tables of the documentation and of the README, and the pictures
=================  ==================================================================================================

`python -m benchmarks.performance --help`, from the root of the repository.
"""
