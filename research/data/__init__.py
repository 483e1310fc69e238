"""Data sets: a source (a frozen dataclass) whose `load()` gives its splits by name.

A split turns (seed, step) into a batch, a dict of numpy arrays whose first axis is the example:

- inputs, targets: whatever the task reads
- weights: [batch] or [batch, time] float32; 0 marks padding, which counts in no mean
- lengths: [batch] int32, where inputs are padded in time
- reset: [batch] bool, where rows continue the previous batch: True starts a row afresh
"""
