"""The compiled ops that a step of FastDeploy's V1 scheduler calls, by their formulas, in NumPy.

They change tensors in place where the kernel of the same name does. Names in shapes: B slots of the batch, T rows of
this step, H hidden size, D head size, V words, L the longest sequence.
"""
