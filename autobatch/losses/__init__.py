"""Weigh losses, so that the gradients of micro-batches add up to the effective batch's."""
