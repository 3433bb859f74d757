"""What a new device is installed from, made from a round or from a model file."""
