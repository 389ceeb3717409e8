"""Turn whatever ``Model.fit`` accepts into effective batches on the host."""
