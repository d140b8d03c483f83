"""Everything that Ray and DeepSpeed do not promise to keep; no other package reaches into them.

Each library has a module here, each borrowed name an entry that says what it is for. `tests/test_internals.py` looks
all of them up, so that a release that moves one is caught by name.
"""
