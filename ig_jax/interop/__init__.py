"""Published weights: their names, their import and export."""
