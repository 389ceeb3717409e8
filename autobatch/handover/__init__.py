"""Handover between a script and the process that starts it again: a folder, and what each writes there for the other.

The script writes how far it is, the other one why the script starts again. Standard library only: neither side waits
for TensorFlow here.
"""
