"""Weights for losses, with which the gradients of micro-batches add up to the effective batch's."""
