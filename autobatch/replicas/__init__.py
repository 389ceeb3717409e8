"""Training on several replicas and workers: the protocol of one device, with agreement between them."""
