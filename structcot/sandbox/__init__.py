"""Generated programs run apart: no network, no files but a scratch directory, and limits on time, memory, processes and output."""
