"""Make each step a transaction: undo it after running out of memory, and run it again in smaller micro-batches."""
