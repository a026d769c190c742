"""`python -m deqzoo`."""

from deqzoo.cli import main

if __name__ == "__main__":
    main()
