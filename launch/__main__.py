"""`python -m launch` is `amfm`."""

from launch.cli import main

if __name__ == "__main__":
    main()
