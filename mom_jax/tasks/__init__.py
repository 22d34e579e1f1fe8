"""Evaluations of a trained run: each task is a function of a `Run`.

A task returns values for evaluation.json and may write pictures to the workdir.
"""
