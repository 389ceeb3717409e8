"""Data of every kind that ``Model.fit`` accepts, turned into effective batches on the host."""
