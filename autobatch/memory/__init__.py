"""Memory of a device: how much there is, how it is limited, and how running out of it is recognised.

`oom` decides what is out of memory, `limits` how many bytes may be used. `arena` gives a process a limit of its own,
`nvml` asks the driver. Nothing here knows models, trials or training, or imports TensorFlow while it is loaded.
"""
