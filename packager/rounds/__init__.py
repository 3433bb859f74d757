"""Round folders as the packager reads them."""
