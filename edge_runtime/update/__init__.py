"""One update from patch to commit: admission, trial, hooks, rollback."""
