"""A host of the tests' own: it keeps FastDeploy's contracts, in its own code, on a CPU with gloo.

What is kept: constructors, attribute and parameter names, `forward_cuda` bound to the instance in the constructor,
norms that return 2-tuples and cast to the weight's dtype, an all-reduce that is a module-global name in each model
file, both checkpoint loaders, the order in which plugins load, the strict parser of the workers, the shell string
that starts them. What a layer computes between these is as small as it can be: attention reads one row at a time.
"""
