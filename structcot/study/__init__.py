"""A study: demonstrations -> variants -> training -> evaluation -> tests of differences -> report."""
