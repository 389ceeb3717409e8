"""Train on several replicas and workers: the same protocol as on one device, with agreement between them."""
