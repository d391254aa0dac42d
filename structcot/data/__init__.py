"""The way of the data: rows of files become records, records become rendered samples, samples become a memory-mapped store."""
