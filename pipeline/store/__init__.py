"""The zarr store of teacher predictions: encoding, layout, reading, writing, labelling, maintenance, estimates.

Must not know about training or students' checkpoints.
"""
