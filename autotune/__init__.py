"""Choosing among legal configurations: the search space, the cost model, measurement and records of winners.

Nothing here imports the compiler: the tuner is handed a function `build(config)` and times what it returns.
Records are JSON files that a person can read, the shipped ones included.
"""
