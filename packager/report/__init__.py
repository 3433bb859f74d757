"""What a patch or a run holds, as data, text and pages."""
