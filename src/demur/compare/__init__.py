"""Directions compared: their geometry, what they do, and which parts of the model make them.

A `Contrast` is a difference with the rows behind it, so that every figure can be resampled,
permuted and split; a vector of somebody else is one without rows. Two contrasts are compared at one
site and one position of one model only; what does not match is explained, never averaged over.
"""
