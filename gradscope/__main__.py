"""``python -m gradscope``."""

from gradscope.cli.main import main

if __name__ == "__main__":
    main()
