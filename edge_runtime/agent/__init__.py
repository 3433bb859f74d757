"""Updates without a person: look at a folder, decide, apply, report."""
