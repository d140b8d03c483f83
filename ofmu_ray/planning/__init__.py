"""Estimates before a run starts: memory, time, communication, cost.

There are no rules of thumb: the model's forward and backward pass runs on the meta device (`trace`), the method's
rounds run on vectors without storage (`replay`), and `memory` and `cost` combine both for a parallel layout.
"""
