"""From a torch module to a graph, weights and init recipe that a device can run."""
