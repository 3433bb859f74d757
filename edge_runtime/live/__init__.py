"""What running programs answer with: predictors that follow the store, and proofs."""
