"""Entry point of `python -m structcot.eval`."""

from structcot.cli import run_command

if __name__ == "__main__":
    run_command("eval")
