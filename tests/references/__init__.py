"""Slow copies of optimizers that follow their papers line by line, for one parameter.

A reference is a generator function ``name(k, p, grads)``: the numbers of a configuration by name, a
parameter and its gradients. After each step it yields the parameter and its slots by name. It is
written with torch operations that autograd can differentiate, and knows nothing of the library.
A row of the table names it (``reference=``); ``test_references.py`` holds the three APIs to it.
"""
