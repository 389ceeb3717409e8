"""Steps as transactions: each is undone after running out of memory, and run again in smaller micro-batches."""
