"""The benchmark of the book: its meta-gradients, samplers and growth of cost beside those of its peers."""
