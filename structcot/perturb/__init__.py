"""Perturbations of demonstrations: their content or their structure, by a stated amount, with a report of what was really done."""
