"""Training: from a config to an export. Read `loop.py` first, which holds the whole training loop in one function.

`config.py` describes an experiment, and `step.py`, `sampling.py` and `losses.py` make one training step. `stages.py` has the
stages after training: search, calibration, evaluation, export. `constrained.py` is the search under constraints. `runs.py`
lists the files in a run's folder. `data/` and `datasets/` provide the examples.
"""
