"""Gluon: explicit layouts, asynchronous products and specialised warps, for Hopper."""
