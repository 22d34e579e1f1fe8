"""What a trained run can be asked: each task is a function of a `Run`.

A task returns values for evaluation.json and may leave pictures in the workdir.
"""
