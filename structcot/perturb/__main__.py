"""`python -m structcot.perturb` is `structcot perturb`."""

from structcot.cli import run_command

if __name__ == "__main__":
    run_command("perturb")
