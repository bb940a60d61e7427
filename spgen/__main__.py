"""`python -m spgen` is the command `spgen`."""

from spgen.cli import main

if __name__ == "__main__":
    main()
