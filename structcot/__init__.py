"""structcot: long-chain-of-thought fine-tuning, and the instrument to ask what in a demonstration teaches.

Importing this package imports nothing else: every command loads what it needs when it runs.
"""

__version__ = "0.7.0"
