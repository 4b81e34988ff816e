"""``python -m deltamux`` is the ``deltamux`` command."""

from .server.cli import main

if __name__ == "__main__":
    main()
