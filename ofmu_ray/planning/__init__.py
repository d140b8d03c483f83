"""What a run will need before it starts: memory, time, communication, cost.

Nothing here is a table of rules of thumb: the model's own forward and backward pass runs on the meta device
(`trace`), the method's own rounds run over vectors without storage (`replay`), and `memory` and `cost` put both
together for a parallel layout.
"""
