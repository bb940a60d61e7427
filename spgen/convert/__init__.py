"""Patterns from what other tools hold: one file per kind of source, each with its `from_…` function.

flex         FlexAttention's mask_mod and BlockMask
mask         dense masks, boolean or additive
sparse       torch's sparse tensors
minference   MInference's head configurations
"""
