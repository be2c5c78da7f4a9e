"""What a run found, as values, a page, pictures and progress bars."""
