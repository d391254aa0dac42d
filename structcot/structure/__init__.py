"""The structure of chains of thought: steps, their types, and what can be counted on them."""
