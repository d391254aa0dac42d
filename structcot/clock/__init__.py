"""Clock puzzles: a task that needs search, with its demonstrations, and a model small enough to learn it on a laptop."""
