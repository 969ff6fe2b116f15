"""Features of sparse autoencoders: banks of latents, their discovery, verification and clamping.

A `Bank` is the part of a sparse autoencoder or transcoder that an experiment needs: an encoder, a
decoder, and the conventions under which they were trained. A `Clamp` changes latents and leaves
what the autoencoder does not explain untouched.
"""
