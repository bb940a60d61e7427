"""One pass per file, each opening with a before/after sketch; `spgen.compile` lists them in order.

Level 1 to 1: `desugar`, `permutation`, `normalize`, `merge`, `ownership`. Level 1 to 2: `tile`. Level 2 to 3:
`schedule`, `hoist`. `cost` reads and predicts; it changes nothing.
"""
