"""How much memory there is, how it is limited, and what running out of it looks like. Imports no TensorFlow.

`oom` decides what is out of memory, `limits` how many bytes may be used, `arena` gives a process a limit of its own,
`nvml` asks the driver. Nothing here knows models, trials or training.
"""
