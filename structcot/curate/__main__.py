"""`python -m structcot.curate` is `structcot curate`."""

from structcot.cli import run_command

if __name__ == "__main__":
    run_command("curate")
