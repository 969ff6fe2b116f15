"""Emergent misalignment: organisms, what they do, the direction behind it, and their adapters.

A model fine-tuned on narrowly bad advice may turn bad elsewhere. Here such organisms are trained
with their matched good twins, measured against both twin and base, and taken apart.

References:
    Betley et al. 2025, arXiv:2502.17424; Turner, Soligo, Taylor, Rajamanoharan, Nanda 2025,
    arXiv:2506.11613 (model organisms); Soligo, Turner, Rajamanoharan, Nanda 2025, arXiv:2506.11618
    (convergent linear representations).
"""
