"""Generated programs run apart: no network, no files but the interpreter's to read, no other process, and limits on all that they use."""
