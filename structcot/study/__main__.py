"""`python -m structcot.study` is `structcot study`."""

from structcot.cli import run_command

if __name__ == "__main__":
    run_command("study")
