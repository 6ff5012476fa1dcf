from onlinerl.api import Run as Run
from onlinerl.api import list_runs as list_runs
from onlinerl.api import load_config as load_config

__version__: str
