"""Programs that reproduce the paper's tables."""
