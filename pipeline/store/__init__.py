"""The zarr store of teacher outputs: encoding, layout, reading, writing, verifying, and labelling units.

Knows nothing of students.
"""
