"""A server that starts and never answers."""

import time

from onlinerl.processes import die_with_parent

if __name__ == "__main__":
    die_with_parent(0.1)
    time.sleep(600)
