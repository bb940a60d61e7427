"""Source text of the kernels: Jinja2 templates of one strict environment, in a folder per backend.

A template turns level-3 IR into text that reads as if written by hand. Jinja decides structure in a handful of
places; what the tuner varies stays a constant of the rendered kernel.
"""
