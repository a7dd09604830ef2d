"""`python -m hanlin`: the command line."""

from hanlin.cli.main import main

if __name__ == "__main__":
    main()
