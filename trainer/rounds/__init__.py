"""Many rounds of one run: what each starts from, trains and deploys."""
