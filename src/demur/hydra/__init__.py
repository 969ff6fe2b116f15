"""Does refusal repair itself? Units ablated, backups found, effects split, gates tested.

A unit is anything that can be read and set: a direction in one block, a head or an MLP, a latent of
a bank. The experiment is the same for all of them, and asks for more than a refusal that survives
an ablation: which later units stand in, how much of the effect they and the norms give back, and
whether they stand in only while harm is seen.

References:
    McGrath et al. 2023, arXiv:2307.15771 (the hydra effect); Rushing and Nanda 2024,
    arXiv:2402.15390 (self-repair, and the norm's part in it).
"""
