"""`python -m onlinerl.cli`, where no script is installed."""

from onlinerl.cli import main

if __name__ == "__main__":
    main()
