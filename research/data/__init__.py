"""Data sets: a source (a frozen dataclass) whose `load()` gives its splits by name.

A split turns (seed, step) into a batch, a dict of numpy arrays whose first axis is the example:

- inputs, targets: whatever the task reads
- weights: [batch] or [batch, time] float32; 0 marks padding, which counts in no mean
- lengths: [batch] int32, where inputs are padded in time
- segments, positions: [batch, time] int32, where a row holds several documents: the number of each
  place's document, 0 for padding, and the place's distance from its start
- reset: [batch] bool, where rows continue the previous batch: True starts a row afresh
"""
