"""The device's folder: slots, state, and the one commit point."""
