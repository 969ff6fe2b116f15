"""What a comparison found, as plain frozen rows: no tensor, no model, nothing that needs torch.

Pages are built from these alone, and a record is read back into them.
"""
