"""Quality against time: recipes, tracks, and the table of records."""
