"""Programs around the product; not part of the wheel."""
