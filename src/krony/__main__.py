"""python -m krony."""

from krony.cli import main

if __name__ == "__main__":
    main()
