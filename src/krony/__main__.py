"""python -m krony."""

from krony.cli.app import main

if __name__ == "__main__":
    main()
