"""What a step costs on a TPU and a GPU, by their own compilers, on a machine that has neither.

=================  ==================================================================================================
File               What it does
=================  ==================================================================================================
`environment.py`   makes an environment with the chips' compilers and runs this package in it
`chips.py`         the chips, and how to compile for them
`steps.py`         the rows: steps of this library and of Optax
`training.py`      rows of a whole training step
`pod.py`           rows of many chips, and their results file
`ordinary.py`      which branch of each conditional an ordinary step takes
`hlo.py`           the count of bytes, from the compiled program
`measure.py`       a step -> its row; the results file
`bounds.py`        what the rows are to stay below
`page.py`          results -> the tables in the terminal and in the documentation
`pictures.py`      results -> the picture
=================  ==================================================================================================

`make accelerators`, or `make accelerators ARGS=--tpu`. `tests/pages/test_accelerators.py` checks the bounds of the TPU.
"""
