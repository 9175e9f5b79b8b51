"""`python -m longattn` is the command `longattn`."""

from longattn.cli import main

if __name__ == "__main__":
    main(prog_name="longattn")
