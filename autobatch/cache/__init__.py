"""Earlier results, found again by what they depend on: SQLite in the user's cache folder, nothing pickled."""
