"""What podgate found, as pages that a browser shows without any server."""
