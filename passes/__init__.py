"""From what is wanted to how it is computed: one pass per file, each opening with a before/after sketch.

A pass rewrites the IR of one level or lowers it to the next; it holds the opinions about speed that the IR does not.
The order in which passes run is not decided here but in the one visible list of `spgen/compile.py`.
"""
