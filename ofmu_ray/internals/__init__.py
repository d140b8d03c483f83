"""The private APIs of Ray, DeepSpeed and transformers that we use; no other package touches them.

Each library has a module here, and each private name an entry that states its purpose. `tests/test_internals.py` looks
all of them up, so a release that moves one fails by name.
"""
