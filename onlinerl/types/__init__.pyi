from onlinerl.types.labels import *
from onlinerl.types.plan import *
from onlinerl.types.prompts import *
from onlinerl.types.records import *
from onlinerl.types.rollouts import *
from onlinerl.types.seeds import *
from onlinerl.types.tables import *
from onlinerl.types.training import *
