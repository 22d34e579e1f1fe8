"""What a training step costs on machines that are not at hand.

`hlo` reads a compiled program, `traffic` knows what collectives move over which
links, `cost` adds up a program, `compiled` and `arithmetic` make the cost of a
training step for TPUs and for GPUs, `report` turns it into a plan.
"""
