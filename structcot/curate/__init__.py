"""From prompts to demonstrations: a teacher's chains of thought, checked, in one format, without duplicates and without benchmarks."""
