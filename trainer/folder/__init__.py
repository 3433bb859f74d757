"""Run and round folders as the trainer writes them."""
