"""Cost of a training step on accelerators that are not at hand.

`compiled` (TPUs) and `arithmetic` (GPUs) make the cost of a training step,
`report` turns it into a plan. Below them `hlo` reads a compiled program,
`traffic` knows the bytes that collectives move over which links, `cost` adds up
a program, and `suggestions` names what to change where it does not fit.
"""

__all__ = ['arithmetic', 'compiled', 'report']
