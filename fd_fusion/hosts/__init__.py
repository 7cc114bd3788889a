"""Where a model's layers come from: each host finds the pairs and knows how its layers take a Site."""
